"""I-1 from a log of system calls: replays who each process is, and what it executes or maps.

What a user was granted (capability.json) ends with the bearer's execve: what follows is the user's
own program, and no more of ours than any other payload.

The log is strace's (`strace -f -y --decode-pids=pidns`). Each process starts as a copy of its
parent at the call that made it; the order of lines of different processes does not matter. Of a log
that holds more than a launch, only what ordinary users started of ours is judged.
"""

from __future__ import annotations

import bisect
import functools
import operator
import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

CALLS = (
    "execve,execveat,clone,clone3,fork,vfork,unshare,setuid,setreuid,setresuid,setfsuid,setgid,"
    "setregid,setresgid,setfsgid,capset,prctl,mmap,mprotect"
)
_LINE = re.compile(r"^(\d+) +(.*)$")
_UNFINISHED = re.compile(r"^(.*?) <unfinished \.\.\.>$")
_RESUMED = re.compile(r"^<\.\.\. \w+ resumed>(.*)$")
_CALL = re.compile(r"^(\w+)\((.*)\) += (-?\d+|\?|0x[0-9a-f]+)(.*)$", re.DOTALL)
_OUTER_PID = re.compile(r"/\* (\d+) in strace's PID NS \*/")
_INTERPRETER = re.compile(r"/(lib)?python[0-9.]*(\.so[0-9.]*)?$")
_OURS = re.compile(r"/(apptainer-py|starter(-steps)?(-suid)?)$")
# Copies that tests remove before the log is read.
_SET_USER_ID = re.compile(r"/libexec/apptainer-py/starter(-steps)?-suid$")
_BY_DESCRIPTOR = re.compile(r'^(?:\d+|AT_FDCWD)<([^<>]*)>, "((?:[^"\\]|\\.)*)"')
_SAYS_NOTHING = re.compile(
    r"mmap\((?!.*PROT_EXEC)|mprotect\((?!.*PROT_EXEC)|prctl\((?!PR_SET_[NK])"
)
FORKS = ("clone", "clone3", "fork", "vfork")
EXECS = ("execve", "execveat")


@dataclass(frozen=True)
class Call:
    """A system call that succeeded; `pid` is the new process of a fork.

    A process that is killed in a fork takes that number with it: then `pid` is 0.
    """

    name: str
    arguments: str
    line: int  # of the log, on which it began
    pid: int = 0


@dataclass(frozen=True)
class Who:
    """What decides whether a process holds, or can regain, privilege on the host."""

    uid: tuple[int, int, int, int]
    gid: tuple[int, int, int, int]
    permitted: bool = False
    held: frozenset[str] = frozenset()  # the names of what is permitted, where capset has told
    keeps: bool = False
    no_new_privs: bool = False
    inner: bool = False  # in a user namespace of its own, whose capabilities are not the host's
    judged: bool = True

    def privileged(self) -> bool:
        """Return whether an id or a capability of the host's is there, or can be had back."""
        return self.permitted or (not self.inner and 0 in (*self.uid, *self.gid))

    def is_roots(self) -> bool:
        """Return whether this is root in every id, for ever no more: a janitor, its plugins."""
        return {*self.uid, *self.gid} == {0} and self.no_new_privs and not self.inner

    def bears(self, grant: frozenset[str]) -> bool:
        """Return whether this is an ordinary user who holds a part of a grant, for ever no more."""
        user = len({*self.uid}) == len({*self.gid}) == 1 and 0 not in (self.uid[0], self.gid[0])
        return user and self.no_new_privs and bool(self.held) and self.held <= grant


@dataclass
class Findings:
    """What the replay saw: violations, and how much there was to see."""

    violations: list[str] = field(default_factory=list)
    privileged: int = 0
    interpreters: int = 0
    processes: int = 0
    plugins: int = 0  # the administrator's own programs, which a janitor has started
    bearers: int = 0  # payloads that were started with what their user had been granted
    launches: int = 0  # how often an ordinary user executed a starter set-user-id


Life = tuple[int, int]  # a process's number, and how often that number had been used


@dataclass
class Log:
    """The calls of each process in its own order, and the line on which each process begins."""

    calls: dict[Life, list[Call]] = field(default_factory=dict)
    begins: dict[int, list[int]] = field(default_factory=dict)

    def part(self) -> None:
        """Give what follows a fork to its child, where the log lacks the end of the one before."""
        forks = [call for calls in self.calls.values() for call in calls if call.pid]
        for fork in sorted(forks, key=operator.attrgetter("line")):
            begins = self.begins.get(fork.pid, [])
            use = bisect.bisect(begins, fork.line)
            old = self.calls.get((fork.pid, use), [])
            new = [call for call in old if call.line > fork.line]
            if not new:
                continue
            del old[len(old) - len(new) :]
            for later in range(len(begins), use, -1):
                self.calls[fork.pid, later + 1] = self.calls.pop((fork.pid, later))
            begins.insert(use, new[0].line)
            self.calls[fork.pid, use + 1] = new


def parse(lines: Iterable[str]) -> Log:
    """Return the successful calls of each process."""
    log = Log()
    halves: dict[int, tuple[int, str]] = {}
    ended: set[int] = set()
    for number, line in enumerate(lines):
        matched = _LINE.match(line)
        if not matched:
            raise ValueError(f"not a line of strace: {line}")
        pid, rest = int(matched[1]), matched[2]
        if pid not in log.begins or pid in ended:
            ended.discard(pid)
            log.begins.setdefault(pid, []).append(number)
            log.calls[pid, len(log.begins[pid])] = []
        calls = log.calls[pid, len(log.begins[pid])]
        if rest.startswith("+++"):
            ended.add(pid)
            begun, text = halves.pop(pid, (number, ""))
            if text.partition("(")[0] in FORKS:
                calls.append(Call(text.partition("(")[0], text, begun))
        elif _SAYS_NOTHING.match(rest):
            continue
        elif half := _UNFINISHED.match(rest):
            halves[pid] = number, half[1]
        else:
            begun = number
            if resumed := _RESUMED.match(rest):
                begun, text = halves.pop(pid, (number, ""))
                rest = text + resumed[1]
            if (call := _call(rest, begun)) is not None:
                calls.append(call)
    log.part()
    return log


def _call(text: str, begun: int) -> Call | None:
    found = _CALL.match(text)
    if not found or found[3].startswith("-"):
        return None
    if found[1] not in FORKS:
        return None if found[3] == "?" else Call(found[1], found[2], begun)
    outer = _OUTER_PID.search(found[4])
    pid = int(outer[1]) if outer else 0 if found[3] == "?" else int(found[3], 0)
    return Call(found[1], found[2], begun, pid)


class Replay:
    """One log, replayed from its first process on."""

    def __init__(
        self, lines: Iterable[str], first: Who, grant: frozenset[str] = frozenset()
    ) -> None:
        log = parse(lines)
        self.calls, self.begins = log.calls, log.begins
        self.findings = Findings()
        self.grant = grant
        self.lost: list[tuple[int, Who]] = []
        self._process(next(iter(self.calls)), first)
        while (orphan := self._orphan()) is not None:
            self._process(*orphan)
        if self.calls:
            raise ValueError(f"processes without a parent: {sorted(self.calls)}")

    def _orphan(self) -> tuple[Life, Who] | None:
        """Return a process whose parent was killed in its fork, as the last of these would be."""
        for pid, use in sorted(self.calls, key=self._begin):
            before = [fork for fork in self.lost if fork[0] < self._begin((pid, use))]
            if before:
                fork = max(before, key=operator.itemgetter(0))
                self.lost.remove(fork)
                return (pid, use), fork[1]
        return None

    def _begin(self, life: Life) -> int:
        return self.begins[life[0]][life[1] - 1]

    def _process(self, life: Life, who: Who) -> None:
        self.findings.processes += who.judged
        privileged = False
        for call in self.calls.pop(life, []):
            before = who
            if call.name in FORKS:
                if call.pid:
                    self._process(self._born(call), _child(who, call))
                else:
                    self.lost.append((call.line, _child(who, call)))
                continue
            change = _CHANGES.get(call.name)
            if change is not None:
                who = change(who, call)
            self.findings.launches += call.name in EXECS and who.judged and _is_suid(call)
            if who.judged or before.judged:
                privileged |= who.privileged()
                self._judge(life[0], call, before, who)
        self.findings.privileged += privileged

    def _born(self, fork: Call) -> Life:
        """Numbers are used again: it is the first life of one that begins behind the fork."""
        begins = self.begins.get(fork.pid, [])
        return fork.pid, bisect.bisect(begins, fork.line) + 1

    def _judge(self, pid: int, call: Call, before: Who, after: Who) -> None:
        what = ""
        if call.name in EXECS:
            what = _interpreted(_executed(call))
            # The one exec with a capability: of the payload, by a process that never maps a Python.
            if before.permitted and before.bears(self.grant):
                self.findings.bearers += 1
            elif _is_administrators(before, call):
                self.findings.plugins += 1
            elif before.privileged():
                self.findings.violations.append(f"{pid}: executes {call.arguments} as {before}")
        elif call.name in ("mmap", "mprotect") and "PROT_EXEC" in call.arguments:
            mapped = re.search(r"<([^<>]*)>", call.arguments)
            what = mapped[1] if mapped and _INTERPRETER.search(mapped[1]) else ""
        if not what:
            return
        self.findings.interpreters += 1
        # What a program can regain by executing itself set-user-id is the exec's own affair.
        if after.privileged() or (call.name not in EXECS and before.privileged()):
            self.findings.violations.append(f"{pid}: {what} as {after}")


def _child(who: Who, call: Call) -> Who:
    inner = "CLONE_NEWUSER" in call.arguments
    return replace(who, inner=True, permitted=False) if inner else who


def _is_suid(call: Call) -> bool:
    return bool(_SET_USER_ID.search(_executed(call)))


def _quoted(arguments: str) -> str:
    matched = re.search(r'"((?:[^"\\]|\\.)*)"', arguments)
    return matched[1] if matched else ""


def _executed(call: Call) -> str:
    """Return the path of a program; with execveat, of the file that is open."""
    named = _BY_DESCRIPTOR.match(call.arguments) if call.name == "execveat" else None
    if named is None:
        return _quoted(call.arguments)
    return os.path.join(named[1], named[2]) if named[2] else named[1]


def _is_administrators(who: Who, call: Call) -> bool:
    """Return whether a janitor starts what root alone can have written: no concern of I-1's."""
    return who.judged and who.is_roots() and _is_trusted(_executed(call))


@functools.cache
def _is_trusted(path: str) -> bool:
    """Return whether a program, and each directory above it, is root's alone to write."""
    real = Path(path).resolve()
    places = [real, *real.parents]
    try:
        facts = [place.lstat() for place in places]
    except OSError:
        return False
    right = all(one.st_uid == 0 and not one.st_mode & 0o022 for one in facts)
    return right and os.path.isabs(path) and stat.S_ISREG(facts[0].st_mode)


@functools.cache
def _interpreted(path: str) -> str:
    """Return the path of a Python, or of a script on the host; "" for another program."""
    if _INTERPRETER.search(os.path.realpath(path)):
        return path
    try:
        with open(path, "rb") as program:
            return path if program.read(2) == b"#!" else ""
    except OSError:
        return ""


def _execute(who: Who, call: Call) -> Who:
    path = _executed(call)
    user, group = who.uid[1], who.gid[1]
    judged = who.judged or (bool(_OURS.search(path)) and not who.privileged())
    if not who.no_new_privs and not who.inner:
        new_user, new_group = _set_ids_of(path)
        user = user if new_user is None else new_user
        group = group if new_group is None else new_group
    permitted = not who.inner and 0 in (who.uid[0], user)
    return replace(
        who,
        uid=(who.uid[0], user, user, user),
        gid=(who.gid[0], group, group, group),
        permitted=permitted,
        held=frozenset(),
        keeps=False,
        judged=judged and not _is_administrators(who, call),
    )


@functools.cache
def _set_ids_of(path: str) -> tuple[int | None, int | None]:
    """Return the user and group that a program is executed as, where it says so."""
    if _SET_USER_ID.search(path):
        return 0, None
    try:
        facts = os.stat(path)
    except OSError:
        return None, None  # a path in the image, whose set-user-id bits its mount takes away
    return (
        facts.st_uid if facts.st_mode & stat.S_ISUID else None,
        facts.st_gid if facts.st_mode & stat.S_ISGID else None,
    )


def _numbers(call: Call) -> list[int]:
    return [int(word) for word in re.findall(r"-?\d+", call.arguments)]


def _set_ids(name: str) -> Callable[[Who, Call], Who]:
    def change(who: Who, call: Call) -> Who:
        old: tuple[int, int, int, int] = getattr(who, name)
        given = _numbers(call)
        if len(given) == 3:
            real, effective, saved = (
                was if new in (-1, 2**32 - 1) else new
                for new, was in zip(given, old[:3], strict=True)
            )
        elif len(given) == 2:
            real, effective = (
                was if new == -1 else new for new, was in zip(given, old[:2], strict=True)
            )
            saved = effective
        elif who.permitted:
            real = effective = saved = given[0]
        else:
            real, effective, saved = old[0], given[0], old[2]
        changed = replace(who, **{name: (real, effective, saved, effective)})
        if name == "uid" and 0 in old[:3] and 0 not in changed.uid[:3] and not who.keeps:
            changed = replace(changed, permitted=False)
        return changed

    return change


def _set_file_system_id(name: str) -> Callable[[Who, Call], Who]:
    def change(who: Who, call: Call) -> Who:
        old: tuple[int, int, int, int] = getattr(who, name)
        wanted = _numbers(call)[0]
        if wanted in (-1, 2**32 - 1) or (wanted not in old and not who.permitted):
            return who
        return replace(who, **{name: (*old[:3], wanted)})

    return change


def _capset(who: Who, call: Call) -> Who:
    found = re.search(r"permitted=([^,}]+)", call.arguments)
    if found is None:
        raise ValueError(f"capset that cannot be read: {call}")
    held = frozenset(re.findall(r"CAP_\w+", found[1])) or frozenset({found[1].strip()}) - {"0"}
    return who if who.inner else replace(who, permitted=bool(held), held=held)


def _prctl(who: Who, call: Call) -> Who:
    if call.arguments.startswith("PR_SET_NO_NEW_PRIVS"):
        return replace(who, no_new_privs=True)
    if call.arguments.startswith("PR_SET_KEEPCAPS"):
        return replace(who, keeps="1" in call.arguments.partition(",")[2])
    return who


def _unshare(who: Who, call: Call) -> Who:
    return replace(who, inner=True, permitted=False) if "NEWUSER" in call.arguments else who


_CHANGES: dict[str, Callable[[Who, Call], Who]] = {
    "execve": _execute,
    "execveat": _execute,
    "setuid": _set_ids("uid"),
    "setreuid": _set_ids("uid"),
    "setresuid": _set_ids("uid"),
    "setgid": _set_ids("gid"),
    "setregid": _set_ids("gid"),
    "setresgid": _set_ids("gid"),
    "setfsuid": _set_file_system_id("uid"),
    "setfsgid": _set_file_system_id("gid"),
    "capset": _capset,
    "prctl": _prctl,
    "unshare": _unshare,
}
