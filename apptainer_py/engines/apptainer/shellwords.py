"""Words of the shell's language, and what they expand to, as far as every shell agrees.

What is here is of POSIX.1-2017, XCU §2.2, §2.6 and §2.10.2; what is not is NotSimple.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Exists = Callable[[str, str], bool]

LOWER = "abcdefghijklmnopqrstuvwxyz"
_START = LOWER + "ABCDEFGHIJKLMNOPQRSTUVWXYZ_"
_IN_NAME = _START + "0123456789"
_PLAIN = _IN_NAME + "-./:,=+@%^#!]"
_PLAIN_IN_QUOTED_BRACES = _PLAIN + " *?[;&|<>"
_END_OF_COMMAND = "\n;&|\0"
END_OF_WORD = _END_OF_COMMAND + " \t<>()"
# Some shell computes these, refuses to set them, or works otherwise once they are set.
OF_THE_SHELL = frozenset(
    (
        "_ IFS OPTIND OPTARG OPTERR PPID LINENO RANDOM SRANDOM SECONDS EPOCHSECONDS EPOCHREALTIME"
        " UID EUID GID GROUPS HISTCMD DIRSTACK PIPESTATUS FUNCNAME FUNCNEST SHELLOPTS MAPFILE BASH"
        " BASHOPTS BASHPID POSIXLY_CORRECT GLOBIGNORE EXECIGNORE FIGNORE CHILD_MAX SHLVL OLDPWD"
    ).split()
)
# More than real images have, and little enough that no file keeps a stage busy.
_TEXT_LIMIT = 1 << 16
_EXPANSIONS_LIMIT = 1 << 20
_DEPTH_LIMIT = 40
# Where an expansion stands: some characters mean something else in each.
_BARE, _QUOTED, _QUOTED_IN_BRACES = range(3)


class NotSimple(Exception):
    """The text needs a real shell."""


class Words:
    """Reads a text once, word by word; what is not live is checked, and expands to nothing."""

    text = ""
    at = depth = 0
    live = True
    left = _EXPANSIONS_LIMIT
    # Of the word read last: nothing in it is quoted or expanded; a shell may split or glob it; it
    # has a quote, which keeps it when it is empty; a line break was taken out of it.
    bare = risky = solid = joined = False
    # Our own lines may use the names that the script keeps for itself.
    ours = False

    def __init__(self, variables: dict[str, str], exported: set[str], exists: Exists) -> None:
        self.variables = variables
        self.exported = exported
        self.exists = exists

    def begin(self, text: str) -> None:
        """Turn to another text."""
        if len(text) > _TEXT_LIMIT:
            raise NotSimple
        self.text = _fit(text) + "\0"
        self.at = 0

    def blanks(self) -> None:
        """Pass over blanks, a comment and joined lines."""
        text = self.text
        while True:
            if text[self.at] in " \t":
                self.at += 1
            elif text[self.at] == "#":
                end = text.find("\n", self.at)
                self.at = end if end >= 0 else len(text) - 1
            elif text[self.at] == "\\" and text[self.at + 1] == "\n":
                self.at += 2
            else:
                return

    def lines(self) -> None:
        """Pass over blanks and line ends."""
        self.blanks()
        while self.text[self.at] == "\n":
            self.at += 1
            self.blanks()

    def more(self) -> bool:
        """Return whether the command goes on after the blanks."""
        self.blanks()
        return self.text[self.at] not in _END_OF_COMMAND

    def span(self, characters: str) -> str:
        """Read as many of the characters as there are."""
        text = self.text
        begin = end = self.at
        while text[end] in characters:
            end += 1
        self.at = end
        return text[begin:end]

    def name(self) -> str:
        """Read a variable's name; none is an empty text."""
        return self.span(_IN_NAME) if self.text[self.at] in _START else ""

    def deeper(self) -> None:
        """Count one more level of what is nested."""
        self.depth += 1
        if self.depth > _DEPTH_LIMIT:
            raise NotSimple

    def checked(self, name: str) -> str:
        """Return the name, of a variable that means the same to every shell."""
        inner = name.startswith("BASH_") and name != "BASH_ENV"
        if not name or name in OF_THE_SHELL or inner or (is_ours(name) and not self.ours):
            raise NotSimple
        return name

    def assign(self, name: str, value: str) -> None:
        """Set a variable."""
        if self.checked(name) == "PWD":
            raise NotSimple
        self.variables[name] = value

    def _get(self, name: str) -> str | None:
        value = self.variables.get(self.checked(name))
        if value is not None:
            self.left -= len(_fit(value))
        if self.left < 0 or (value is None and name == "PWD"):
            raise NotSimple
        return value

    def word(self) -> str:
        """Read a word up to what ends it, and expand it."""
        self.bare = True
        self.risky = self.solid = False
        begin = self.at
        parts = []
        while (character := self.text[self.at]) not in END_OF_WORD:
            parts.append(self.span(_PLAIN) or self._piece(character, _QUOTED))
        if self.at == begin:
            raise NotSimple
        return "".join(parts)

    def _piece(self, character: str, quotes: int) -> str:
        """Read what is not plain and not between double quotes."""
        # Bash reads an index, blanks and all, to the bracket that ends it.
        if character == "[" and self.text[self.at - 1] in _IN_NAME:
            raise NotSimple
        if character in "*?[" or (character == "~" and not self.live):
            self.at += 1
            self.risky = True
            return character
        self.bare = False
        if character == "$":
            return self._dollar(_BARE)
        if character == "\\":
            return self._escaped()
        self.solid = True
        if character == '"':
            return self._double_quoted(quotes)
        if character != "'":
            raise NotSimple
        begin = self.at + 1
        self.at = self.text.find("'", begin) + 1
        value = self.text[begin : self.at - 1]
        if not self.at or (quotes == _QUOTED_IN_BRACES and ("}" in value or "{" in value)):
            raise NotSimple
        return value

    def _escaped(self) -> str:
        character = self.text[self.at + 1]
        self.at += 2
        if character == "\n":
            self.joined = True
            return ""
        if not " " <= character <= "~" or character in "{}":
            raise NotSimple
        self.solid = True
        return character

    def _double_quoted(self, where: int) -> str:
        text = self.text
        stops = '"$`\\\0' if where == _QUOTED else '"$`\\\0{}'
        self.at += 1
        parts = []
        while True:
            begin = end = self.at
            while text[end] not in stops:
                end += 1
            parts.append(text[begin:end])
            self.at = end
            if text[end] == '"':
                self.at += 1
                return "".join(parts)
            parts.append(self._expanded(where))

    def _expanded(self, where: int) -> str:
        character = self.text[self.at]
        if character == "$":
            return self._dollar(where)
        if character != "\\":
            raise NotSimple
        self.at += 2
        character = self.text[self.at - 1]
        if character in '"$`\\':
            return character
        # Between quotes within `${NAME-...}`, shells differ.
        if where != _QUOTED:
            raise NotSimple
        if character == "\n":
            return ""
        self.at -= 1
        return "\\"

    def _dollar(self, where: int) -> str:
        self.at += 1
        character = self.text[self.at]
        if character in _START:
            name = self.name()
            if self.text.startswith("\\\n", self.at):
                raise NotSimple  # the name goes on in the next line
            value = self._get(name) or "" if self.live else ""
        elif character == "{":
            value = self._braces(where)
        elif character in " \t\n/.,:=%+" or (where == _QUOTED and character == '"'):
            return "$"
        elif character in "@*#?-!$0123456789" and not self.live:
            self.at += 1
            return ""
        else:
            raise NotSimple
        if where == _BARE:
            self.risky = self.risky or any(special in value for special in " \t\n*?[\\")
        return value

    def _braces(self, where: int) -> str:
        self.at += 1
        name = self.name()
        colon = self.text[self.at] == ":"
        operator = self.text[self.at + colon]
        self.at += 1 + colon
        value = self._get(name) if self.live else None
        if operator == "}" and name and not colon:
            return value or ""
        known = operator in "-+=?" or (operator in "%#" and not self.live and not colon)
        if not name or not known:
            raise NotSimple
        missing = not value if colon else value is None
        wanted = missing != (operator == "+")
        word = self._default(where, wanted=wanted)
        if not wanted or not self.live:
            return "" if operator == "+" else value or ""
        if operator == "?":
            raise NotSimple
        if operator == "=":
            self.assign(name, word)
        return word

    def _default(self, where: int, *, wanted: bool) -> str:
        """Read the word in `${NAME-word}`, and the brace."""
        self.deeper()
        live, solid = self.live, self.solid
        self.live = live and wanted
        plain = _PLAIN if where == _BARE else _PLAIN_IN_QUOTED_BRACES
        quoted = False
        parts = []
        while (character := self.text[self.at]) != "}":
            if character in plain:
                parts.append(self.span(plain))
            elif where == _BARE and character == " ":
                self.at += 1
                self.risky = True
                parts.append(character)
            elif where == _BARE:
                quoted = quoted or character in "\"'"
                parts.append(self._piece(character, _QUOTED_IN_BRACES))
            elif where == _QUOTED and character == '"' and not parts:
                parts.append(self._double_quoted(_QUOTED_IN_BRACES))
                if self.text[self.at] != "}":
                    raise NotSimple  # bash joins a name before that quote with what comes after it
            else:
                parts.append(self._expanded(_QUOTED_IN_BRACES))
        self.at += 1
        word = "".join(parts)
        self.risky = self.risky or (quoted and self.live and not word)
        self.live, self.solid = live, solid
        self.depth -= 1
        return word


def _fit(text: str) -> str:
    # Shells mark their own things with some of these, and drop others.
    if "\0" in text or "\1" in text or "\x7f" in text:
        raise NotSimple
    return text


def is_ours(name: str) -> bool:
    """Return whether the script keeps names of that form for itself."""
    return name.startswith("__") and name.islower()
