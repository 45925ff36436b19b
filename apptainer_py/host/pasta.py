"""A network without privilege: pasta sends what the container sends, as its user would."""

from __future__ import annotations

import os

from apptainer_py.base.errors import LaunchError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PROGRAM = "/usr/bin/pasta"
_DEVICE = "/dev/net/tun"
# pasta's words for a host that has no network itself.
_NO_ROUTE = "External interface not usable"
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
# Stays until its stdin ends, which is when we end, whoever kills us.
_HOLD = "echo r; read -r end"
_AROUND = '"$@" >/dev/null & p=$!; exec 7>&- 8>&- 9>&-; read -r end; kill "$p"; wait "$p"'


class NoPasta(LaunchError):
    """The unprivileged network cannot be had."""

    message = "container creation failed: the network user cannot be set up: {reason}"


class Pasta:
    """One running pasta: it ends when `close` is called, or when this process does."""

    __slots__ = ("_errors", "_life", "_pid", "network_fd")

    def __init__(self, ports: list[dict[str, Any]], spaces: tuple[int, int] | None) -> None:
        """Start it, for the network and user namespaces `spaces`, else with new ones of its own.

        Raises:
            NoPasta: says why not.
        """
        if not os.path.exists(PROGRAM):
            raise NoPasta(reason=f"{PROGRAM} is not installed: install the package passt")
        _check_device()
        self.network_fd = -1
        self._errors = os.memfd_create("pasta", os.MFD_CLOEXEC)
        stdin, self._life = os.pipe2(os.O_CLOEXEC)
        ready, says = os.pipe2(os.O_CLOEXEC)
        words = [PROGRAM, "--config-net", "-q", "-f", "-e", "--no-map-gw", *_ports(ports)]
        if os.geteuid() == 0:
            words += ["--runas", "0:0"]
        # Only who says that it is ready holds that end: its death is then seen.
        given = [(stdin, 0), (says if spaces is None else self._errors, 1), (self._errors, 2)]
        apart: list[int] = []
        if spaces is None:
            words += ["--", "/bin/sh", "-c", _HOLD]
        else:
            # It writes its pid where it is told once it is ready.
            apart = [_apart(fd) for fd in (*spaces, says)]
            given += zip(apart, (7, 8, 9), strict=True)
            words += ["--no-netns-quit", "--netns", "/proc/self/fd/7", "--userns"]
            words += ["/proc/self/fd/8", "-P", "/proc/self/fd/9"]
            words = ["/bin/sh", "-c", _AROUND, "sh", *words]
        actions: list[Any] = [(os.POSIX_SPAWN_DUP2, fd, number) for fd, number in given]
        # A group of its own: signals of the terminal are the payload's.
        self._pid = os.posix_spawn(
            words[0], words, _ENVIRONMENT, file_actions=actions, setsigmask=[], setpgroup=0
        )
        for fd in (stdin, says, *apart):
            os.close(fd)
        if not self._began(ready):
            # Where it fails, a child of pasta's waits for ever.
            os.killpg(self._pid, 9)
            raise NoPasta(reason=self._why())
        os.close(ready)
        if spaces is None:
            self.network_fd = self._open_network()

    def _began(self, ready: int) -> bool:
        import select

        ended = os.pidfd_open(self._pid)
        events = select.poll()
        events.register(ready, select.POLLIN)
        events.register(ended, select.POLLIN)
        first = events.poll()
        os.close(ended)
        return any(fd == ready for fd, _ in first) and os.read(ready, 16).endswith(b"\n")

    def _why(self) -> str:
        text = os.pread(self._errors, 4096, 0).decode("utf-8", "backslashreplace").strip()
        lines = [line for line in text.splitlines() if "syslog" not in line]
        if _NO_ROUTE in text:
            return f"{_NO_ROUTE}: the host has no default route"
        return lines[-1] if lines else "pasta gave no reason"

    def _open_network(self) -> int:
        pid = self._pid
        try:
            with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as children:
                child = children.read().split()[0]
            return os.open(f"/proc/{child}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, IndexError):
            raise NoPasta(reason=self._why()) from None

    def close(self) -> None:
        """End it, and wait until it has ended."""
        os.close(self._life)
        os.waitpid(self._pid, 0)


def _check_device() -> None:
    """Say what pasta would not: which device it is, and who can help."""
    import errno

    try:
        os.close(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        missing = error.errno == errno.ENOENT
        advice = "load the module tun" if missing else "ask your administrator for mode 0666"
        reason = f"{_DEVICE}: {str(error.strerror).lower()}: {advice}"
        raise NoPasta(reason=reason) from None


def _apart(fd: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64)


def _ports(ports: list[dict[str, Any]]) -> list[str]:
    words = []
    for letter, layer in (("-t", "tcp"), ("-u", "udp")):
        wanted = [one for one in ports if one["protocol"] == layer]
        named = ",".join(f"{one['hostPort']}:{one['containerPort']}" for one in wanted)
        words += [letter, named or "none"]
    # What listens on the host's loopback is the host's own.
    return [*words, "-T", "none", "-U", "none"]
