"""The image's environment files, evaluated without the image's shell where they are simple.

Starting that shell costs more than all the rest of a stage.  Here is only the part of its language
(POSIX.1-2017, XCU §2) that every `/bin/sh` reads the same way; everything else is NotSimple, and
then the shell itself is asked.
"""

from __future__ import annotations

from binascii import crc32

from apptainer_py.engines.apptainer.shellwords import (
    END_OF_WORD,
    LOWER,
    OF_THE_SHELL,
    NotSimple,
    Words,
    is_ours,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from apptainer_py.engines.apptainer.shellwords import Exists

__all__ = ["NotSimple", "environment", "run"]

_DEFAULT_PATH = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
_RESERVED = (
    "! [[ if then elif else fi case esac for select while until do done in function time coproc"
).split()
_FILE_TESTS = ("-d", "-e", "-f", "-h", "-L", "-r", "-s", "-x")
# What the script unsets first, because some shell sets it for itself.
_FORGOTTEN = "PATH PS1 PS2 PS4 SHLVL OLDPWD TERM SHELL HOSTNAME HOSTTYPE MACHTYPE OSTYPE".split()
# Length and checksum of 95-apps.sh as Apptainer 1.4 writes it, and as our own builds do.
_FOR_APPS = {3052: 0xB03D1540, 840: 0xF45344C9}
# Every host has these, and they say nothing that a shell could mind.
_HARMLESS = ("_", "SHLVL", "OLDPWD")


class _Commands(Words):
    """Reads a text once: runs the commands that are live, only checks the form of the others."""

    closer = ""

    def read(self, text: str) -> None:
        """Run a whole text."""
        before = self.text, self.at
        self.begin(text)
        self._list()
        self.text, self.at = before

    def _list(self, *closers: str) -> bool:
        """Read up to one of the closers, or to the end; return the last command's success."""
        success = True
        some = False
        while True:
            self.lines()
            word = self._keyword()
            if some and word in closers:
                self.closer = word
                self.at += len(word)
                return success
            if not closers and self.text[self.at] == "\0":
                return success
            success = self._and_or()
            some = True
            if self.text[self.at] in ";\n":
                self.at += 1
            elif self.text[self.at] != "\0":
                raise NotSimple

    def _keyword(self) -> str:
        begin = self.at
        word = self.span(LOWER)
        whole = self.text[self.at] in END_OF_WORD
        self.at = begin
        return word if whole else ""

    def _and_or(self) -> bool:
        live = self.live
        success = self._negatable()
        while (operator := self.text[self.at : self.at + 2]) in ("&&", "||"):
            self.at += 2
            self.lines()
            due = success == (operator == "&&")
            self.live = live and due
            later = self._negatable()
            success = later if due else success
        self.live = live
        return success

    def _negatable(self) -> bool:
        negated = self.text[self.at] == "!" and self.text[self.at + 1] in " \t"
        if negated:
            self.at += 1
            self.blanks()
        success = self._if() if self._keyword() == "if" else self._simple()
        self.blanks()
        return success != negated

    def _if(self) -> bool:
        self.deeper()
        entered = undecided = self.live
        success = True
        self.at += 2
        self.closer = "if"
        while self.closer != "fi":
            self.live = undecided
            closers: tuple[str, ...] = ("fi",)
            if self.closer != "else":
                self.live = self._list("then") and undecided
                closers = ("elif", "else", "fi")
            taken = self.live
            result = self._list(*closers)
            if taken:
                success, undecided = result, False
        self.live = entered
        self.depth -= 1
        return success

    def _simple(self) -> bool:
        assigned = False
        while self._assignment():
            assigned = True
        if assigned and not self.more():
            return True
        self.joined = False
        name = self.word()
        if self.joined or (self.bare and name in _RESERVED):
            raise NotSimple
        if not self.live:
            self._pass_over_words()
            return True
        if assigned or not self.bare:
            raise NotSimple
        return self._run(name)

    def _pass_over_words(self) -> None:
        while self.more():
            operator = self.span("<>")
            if operator:
                if operator not in ("<", ">", ">>"):
                    raise NotSimple
                self.at += operator == ">" and self.text[self.at] == "&"
                self.blanks()
            self.word()

    def _assignment(self) -> bool:
        begin = self.at
        name = self.name()
        if not name or self.text[self.at] != "=":
            self.at = begin
            return False
        value = self._value()
        if self.live:
            self.assign(name, value)
        self.blanks()
        return True

    def _value(self) -> str:
        self.at += 1
        self.risky = False
        return "" if self.text[self.at] in "\n;&|\0 \t" else self.word()

    def _run(self, name: str) -> bool:
        if name in ("test", "["):
            return _judge(self._operands(closed=name == "["), self.exists)
        if name in ("export", "unset"):
            self._declare(unset=name == "unset")
        elif name == "__set" and self.ours:
            # As the script's function of that name: its second word is shell language again.
            variable, value = self._operands(closed=False)
            self.read(f"export {variable}={value}")
        elif name in (":", "true", "false"):
            while self.more():
                self.word()
        else:
            raise NotSimple
        return name != "false"

    def _declare(self, *, unset: bool) -> None:
        found: dict[str, str | None] = {}
        while self.more():
            self.risky = False
            name = self.checked(self.name())
            value = self._value() if self.text[self.at] == "=" and not unset else None
            if self.text[self.at] not in END_OF_WORD or self.risky or name in found:
                raise NotSimple
            # Some shell keeps its own variables exported when they are set again after an unset.
            if name == "PWD" or (unset and name in _FORGOTTEN):
                raise NotSimple
            found[name] = value
        if not found:
            raise NotSimple
        for name, value in found.items():
            if unset:
                self.variables.pop(name, None)
                self.exported.discard(name)
                continue
            if value is not None:
                self.assign(name, value)
            self.exported.add(name)

    def _operands(self, *, closed: bool) -> list[str]:
        words = []
        while self.more():
            word = self.word()
            if self.risky:
                raise NotSimple
            if word or self.solid:
                words.append(word)
        if closed and (not words or words.pop() != "]"):
            raise NotSimple
        return words


def _judge(words: list[str], exists: Exists) -> bool:
    """Do as `test` for the forms that POSIX settles by the number of words."""
    negated = len(words) > 1 and words[0] == "!"
    if negated:
        del words[0]
    if "!" in words or "(" in words or ")" in words:
        raise NotSimple
    if len(words) < 2:
        return any(words) != negated
    if len(words) == 2:
        return _holds(words[0], words[1], exists) != negated
    left, operator, right = words[:3]
    # An older `test` takes a dash and a letter for an operator wherever they stand.
    dash = left.startswith("-") and len(left) == 2
    if len(words) > 3 or dash or operator not in ("=", "!="):
        raise NotSimple
    return (left == right) == ((operator == "=") != negated)


def _holds(operator: str, value: str, exists: Exists) -> bool:
    if operator == "-n":
        return bool(value)
    if operator == "-z":
        return not value
    # What is found there differs from one process to the next.
    if operator not in _FILE_TESTS or value.startswith(("/dev/fd", "/dev/std", "/proc")):
        raise NotSimple
    return bool(value) and exists(operator[1], value)


def run(
    text: str,
    variables: dict[str, str],
    exported: set[str],
    exists: Callable[[str, str], bool],
) -> None:
    """Evaluate a text as a shell does that has unset what it set for itself.

    Some shell always exports PATH, as the script does at its end; here it is as the text says.
    `exists(kind, path)` answers the file tests: the kind is the letter, one of d e f h L r s x.

    Raises:
        NotSimple: only a shell can tell; variables and exported are as they were.
    """
    found, marked = dict(variables), set(exported)
    _Commands(found, marked, exists).read(text)
    variables.clear()
    variables.update(found)
    exported.clear()
    exported.update(marked)


def environment(
    files: list[tuple[str, str]],
    injection: str,
    path_lines: str,
    own: dict[str, str],
    forwarded: dict[str, str],
    exists: Callable[[str, str], bool],
) -> dict[str, str]:
    """Return the payload's environment as the script in `process` makes it, up to the command.

    Args:
        files: path and text of the regular files `/.singularity.d/env/*.sh`; of `/environment`
            where the image has no such folder.
        injection, path_lines: the script's own lines.
        own: what the shell would be started with, PWD among it.
        forwarded: the host's variables, of names that a shell can hold.
        exists: answers the file tests, as for `run`.

    Raises:
        NotSimple: only the image's shell can tell.
    """
    variables = {name: value for name, value in own.items() if name not in _FORGOTTEN}
    if variables.get("SINGULARITY_APPNAME"):
        raise NotSimple
    reader = _Commands(variables, set(variables), exists)
    injected = False
    for path, text in sorted(files, key=_in_name_order):
        name = path.rpartition("/")[2]
        if name == "99-runtimevars.sh":
            continue
        if name == "90-environment.sh" and "PATH" not in variables:
            _fix_path(reader)
        if not _is_for_apps(text) or variables.get("SINGULARITY_APPNAME"):
            reader.read(text)
        if name in ("10-docker2singularity.sh", "10-docker.sh", "environment"):
            _fix_path(reader)
        elif name == "99-base.sh":
            _inject(reader, injection)
            injected = True
    if not injected:
        _inject(reader, injection)
    reader.ours = True
    reader.read(path_lines)
    _forward(reader, forwarded)
    _finish(reader)
    return {name: value for name, value in variables.items() if name in reader.exported}


def _is_for_apps(text: str) -> bool:
    """Return whether a text is the one that does nothing unless an app was chosen.

    Every image of Apptainer has it, and reading it takes longer than all the others. An image that
    forges the sum leaves out a file of its own.
    """
    if len(text) not in _FOR_APPS:
        return False
    return crc32(text.encode("utf-8", "surrogateescape")) == _FOR_APPS[len(text)]


def _in_name_order(file: tuple[str, str]) -> bytes:
    return file[0].encode("utf-8", "surrogateescape")


def _fix_path(reader: _Commands) -> None:
    path = reader.variables.get("PATH", "")
    for part in _DEFAULT_PATH:
        if f":{part}:" not in f":{path}:":
            path = f"{path}:{part}" if path else part
    reader.variables["PATH"] = path
    reader.exported.add("PATH")


def _inject(reader: _Commands, lines: str) -> None:
    if "PATH" not in reader.variables:
        _fix_path(reader)
    reader.ours = True
    reader.read(lines)
    reader.ours = False


def _forward(reader: _Commands, forwarded: dict[str, str]) -> None:
    """Add the host's variables; the image's own win, and one that it sets empty is removed."""
    variables = reader.variables
    for name, value in forwarded.items():
        if is_ours(name) or (name in OF_THE_SHELL and name not in _HARMLESS):
            raise NotSimple
        if name not in variables:
            variables[name] = value
            reader.exported.add(name)
        elif not variables[name]:
            del variables[name]
            reader.exported.discard(name)


def _finish(reader: _Commands) -> None:
    variables = reader.variables
    prompt = variables.get("PS1") or "Apptainer> "
    command = variables.get("PROMPT_COMMAND")
    then = "unset PROMPT_COMMAND"
    if command:
        then = 'PROMPT_COMMAND="${PROMPT_COMMAND%%; PROMPT_COMMAND=*}"'
    place = variables.get("APPTAINER_ENVIRONMENT") or "/.singularity.d/env/91-environment.sh"
    last = {
        "PS1": prompt,
        "PROMPT_COMMAND": f'{command}; {then}; PS1="{prompt}"'
        if command
        else f'PS1="{prompt}"; {then}',
        "APPTAINER_ENVIRONMENT": place,
        "SINGULARITY_ENVIRONMENT": place,
    }
    variables.update(last)
    reader.exported.update(last)
