"""I-1 from a log of system calls: replays who each process is, and what it executes or maps.

The log is strace's (`strace -f -y --decode-pids=pidns`). Each process starts as a copy of its
parent at the call that made it; the order of lines of different processes does not matter.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
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


def parse(text: str) -> dict[int, list[Call]]:
    """Return the successful calls of each process, in its own order."""
    calls: dict[int, list[Call]] = {}
    halves: dict[int, str] = {}
    for line in text.splitlines():
        matched = _LINE.match(line)
        if not matched:
            raise ValueError(f"not a line of strace: {line}")
        pid, rest = int(matched[1]), matched[2]
        calls.setdefault(pid, [])
        if begun := _UNFINISHED.match(rest):
            halves[pid] = begun[1]
            continue
        if resumed := _RESUMED.match(rest):
            rest = halves.pop(pid, "") + resumed[1]
        found = _CALL.match(rest)
        if not found or found[3] == "?" or found[3].startswith("-"):
            continue
        outer = _OUTER_PID.search(found[4])
        result = int(found[3], 0)
        born = (int(outer[1]) if outer else result) if found[1] in FORKS else 0
        calls[pid].append(Call(found[1], found[2], result, born))
    return calls


class Replay:
    """One log, replayed from its first process on."""

    def __init__(self, text: str, first: Who) -> None:
        self.calls = parse(text)
        self.findings = Findings()
        root = next(iter(self.calls))
        self._process(root, first)
        if self.calls:
            raise ValueError(f"processes without a parent: {sorted(self.calls)}")

    def _process(self, pid: int, who: Who) -> None:
        self.findings.processes += 1
        privileged = False
        for call in self.calls.pop(pid, []):
            before = who
            if call.name in FORKS:
                child = who
                if "CLONE_NEWUSER" in call.arguments:
                    child = replace(who, inner=True, permitted=False)
                self._process(call.pid, child)
                continue
            change = _CHANGES.get(call.name)
            if change is not None:
                who = change(who, call)
            privileged |= who.privileged()
            self._judge(pid, call, before, who)
        self.findings.privileged += privileged

    def _judge(self, pid: int, call: Call, before: Who, after: Who) -> None:
        what = ""
        if call.name in ("execve", "execveat"):
            what = _interpreted(_quoted(call.arguments))
        elif call.name in ("mmap", "mprotect") and "PROT_EXEC" in call.arguments:
            mapped = re.search(r"<([^<>]*)>", call.arguments)
            what = mapped[1] if mapped and _INTERPRETER.search(mapped[1]) else ""
        if not what:
            return
        self.findings.interpreters += 1
        # What a program can regain by executing itself set-user-id is the exec's own affair.
        if after.privileged() or (call.name not in ("execve", "execveat") and before.privileged()):
            self.findings.violations.append(f"{pid}: {what} as {after}")


def _quoted(arguments: str) -> str:
    matched = re.search(r'"((?:[^"\\]|\\.)*)"', arguments)
    return matched[1] if matched else ""


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
    try:
        facts = os.stat(path)
        if not who.no_new_privs and not who.inner:
            user = facts.st_uid if facts.st_mode & stat.S_ISUID else user
            group = facts.st_gid if facts.st_mode & stat.S_ISGID else group
    except OSError:
        pass  # a path in the image, whose set-user-id bits its mount takes away
    permitted = not who.inner and 0 in (who.uid[0], user)
    return replace(
        who,
        uid=(who.uid[0], user, user, user),
        gid=(who.gid[0], group, group, group),
        permitted=permitted,
        keeps=False,
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
