"""I-1 from a log of system calls: replays who each process is, and what it executes or maps.

The log is strace's (`strace -f -y --decode-pids=pidns`). Each process starts as a copy of its
parent at the call that made it; the order of lines of different processes does not matter. Of a log
that holds more than a launch, only what ordinary users started of ours is judged.
"""

from __future__ import annotations

import functools
import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

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
_SAYS_NOTHING = re.compile(
    r"mmap\((?!.*PROT_EXEC)|mprotect\((?!.*PROT_EXEC)|prctl\((?!PR_SET_[NK])"
)
FORKS = ("clone", "clone3", "fork", "vfork")


@dataclass(frozen=True)
class Call:
    """A system call that succeeded; `pid` is the new process of a fork."""

    name: str
    arguments: str
    result: int
    pid: int = 0


@dataclass(frozen=True)
class Who:
    """What decides whether a process holds, or can regain, privilege on the host."""

    uid: tuple[int, int, int, int]
    gid: tuple[int, int, int, int]
    permitted: bool = False
    keeps: bool = False
    no_new_privs: bool = False
    inner: bool = False  # in a user namespace of its own, whose capabilities are not the host's
    judged: bool = True

    def privileged(self) -> bool:
        """Return whether an id or a capability of the host's is there, or can be had back."""
        return self.permitted or (not self.inner and 0 in (*self.uid, *self.gid))


@dataclass
class Findings:
    """What the replay saw: violations, and how much there was to see."""

    violations: list[str] = field(default_factory=list)
    privileged: int = 0
    interpreters: int = 0
    processes: int = 0
    launches: int = 0  # how often an ordinary user executed a starter set-user-id


Life = tuple[int, int]  # a process's number, and how often that number had been used


def parse(lines: Iterable[str]) -> dict[Life, list[Call]]:
    """Return the successful calls of each process, in its own order."""
    calls: dict[Life, list[Call]] = {}
    uses: dict[int, int] = {}
    halves: dict[int, str] = {}
    ended: set[int] = set()
    for line in lines:
        matched = _LINE.match(line)
        if not matched:
            raise ValueError(f"not a line of strace: {line}")
        pid, rest = int(matched[1]), matched[2]
        if pid not in uses or pid in ended:
            ended.discard(pid)
            halves.pop(pid, None)
            uses[pid] = uses.get(pid, 0) + 1
            calls[pid, uses[pid]] = []
        if rest.startswith("+++"):
            ended.add(pid)
            continue
        if _SAYS_NOTHING.match(rest):
            continue
        if begun := _UNFINISHED.match(rest):
            halves[pid] = begun[1]
            continue
        if resumed := _RESUMED.match(rest):
            rest = halves.pop(pid, "") + resumed[1]
        if (call := _call(rest)) is not None:
            calls[pid, uses[pid]].append(call)
    return calls


def _call(text: str) -> Call | None:
    found = _CALL.match(text)
    if not found or found[3] == "?" or found[3].startswith("-"):
        return None
    outer = _OUTER_PID.search(found[4])
    result = int(found[3], 0)
    born = (int(outer[1]) if outer else result) if found[1] in FORKS else 0
    return Call(found[1], found[2], result, born)


class Replay:
    """One log, replayed from its first process on."""

    def __init__(self, lines: Iterable[str], first: Who) -> None:
        self.calls = parse(lines)
        self.findings = Findings()
        root = next(iter(self.calls))
        self.births = {root[0]: 1}
        self._process(root, first)
        if self.calls:
            raise ValueError(f"processes without a parent: {sorted(self.calls)}")

    def _process(self, life: Life, who: Who) -> None:
        self.findings.processes += who.judged
        privileged = False
        for call in self.calls.pop(life, []):
            before = who
            if call.name in FORKS:
                self._process(self._born(call.pid), _child(who, call))
                continue
            change = _CHANGES.get(call.name)
            if change is not None:
                who = change(who, call)
            self.findings.launches += call.name == "execve" and who.judged and _is_suid(call)
            if who.judged:
                privileged |= who.privileged()
                self._judge(life[0], call, before, who)
        self.findings.privileged += privileged

    def _born(self, pid: int) -> Life:
        """Numbers are used again: the births and the lives of one follow each other in the log."""
        self.births[pid] = self.births.get(pid, 0) + 1
        return pid, self.births[pid]

    def _judge(self, pid: int, call: Call, before: Who, after: Who) -> None:
        what = ""
        if call.name in ("execve", "execveat"):
            what = _interpreted(_quoted(call.arguments))
            if before.privileged():
                self.findings.violations.append(f"{pid}: executes {call.arguments} as {before}")
        elif call.name in ("mmap", "mprotect") and "PROT_EXEC" in call.arguments:
            mapped = re.search(r"<([^<>]*)>", call.arguments)
            what = mapped[1] if mapped and _INTERPRETER.search(mapped[1]) else ""
        if not what:
            return
        self.findings.interpreters += 1
        # What a program can regain by executing itself set-user-id is the exec's own affair.
        if after.privileged() or (call.name not in ("execve", "execveat") and before.privileged()):
            self.findings.violations.append(f"{pid}: {what} as {after}")


def _child(who: Who, call: Call) -> Who:
    inner = "CLONE_NEWUSER" in call.arguments
    return replace(who, inner=True, permitted=False) if inner else who


def _is_suid(call: Call) -> bool:
    return bool(_SET_USER_ID.search(_quoted(call.arguments)))


def _quoted(arguments: str) -> str:
    matched = re.search(r'"((?:[^"\\]|\\.)*)"', arguments)
    return matched[1] if matched else ""


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
    path = _quoted(call.arguments)
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
        keeps=False,
        judged=judged,
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
    return who if who.inner else replace(who, permitted=found[1].strip() != "0")


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
