"""Messages of the `oci` engine, in the form that runc's clients read (logrus: text or JSON)."""

from __future__ import annotations

import os

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.model.oci_call import OciCall

_LEVELS = {log.FATAL: "error", log.ERROR: "error", log.WARN: "warning", log.DEBUG: "debug"}
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._/@^+")
_COLOURS = {"error": "31", "warning": "33", "debug": "37", "info": "36"}
# What a failure is called in the message, for the commands where it is.
_PREFIXES = {
    "create": "runc create failed: ",
    "run": "runc run failed: ",
    "exec": "exec failed: ",
}


class LogWrong(ApptainerError):
    """The flags of the log itself cannot be obeyed."""

    exit_code = 1


class Log:
    """Where messages of one call go."""

    def __init__(self) -> None:
        self.fd = 2
        self.json = False
        self.debug = False

    def open(self, call: OciCall) -> None:
        """Take the file and form that a call names.

        Raises:
            LogWrong: there is no such form, or the file cannot be opened.
        """
        self.debug = call.debug
        if call.log_format not in ("", "text", "json"):
            raise LogWrong(text=f"invalid log-format: {call.log_format}")
        if call.log:
            flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_SYNC | os.O_CLOEXEC
            try:
                self.fd = os.open(call.log, flags, 0o644)
            except OSError as error:
                reason = (error.strerror or "").lower()
                raise LogWrong(text=f"open {call.log}: {reason}") from None
        self.json = call.log_format == "json"

    def write(self, kind: int, text: str) -> None:
        """Write one message of a level of base.log."""
        if kind == log.DEBUG and not self.debug:
            return
        level = _LEVELS.get(kind, "info")
        os.write(self.fd, self._line(level, text).encode("utf-8", "surrogateescape"))

    def fatal(self, text: str) -> None:
        """Write why the call fails; to stderr too where the log is a file."""
        self.write(log.ERROR, text)
        if self.fd != 2:
            os.write(2, f"{text}\n".encode("utf-8", "surrogateescape"))

    def _line(self, level: str, text: str) -> str:
        if self.json:
            from apptainer_py.model.json_out import quoted

            return f'{{"level":"{level}","msg":{quoted(text)},"time":"{_now()}"}}\n'
        if os.isatty(self.fd):
            name = level.upper()[:4]
            return f"\x1b[{_COLOURS[level]}m{name}\x1b[0m[0000] {text.strip():<44} \n"
        shown = text if text and _PLAIN.issuperset(text) else _go_quoted(text)
        return f'time="{_now()}" level={level} msg={shown}\n'


def _now() -> str:
    import time

    now = time.time()
    parts = time.localtime(now)
    away = parts.tm_gmtoff // 60
    zone = (
        "Z" if not away else f"{'+' if away > 0 else '-'}{abs(away) // 60:02}:{abs(away) % 60:02}"
    )
    return time.strftime("%Y-%m-%dT%H:%M:%S", parts) + zone


_GO_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r", "\a": "\\a",
               "\b": "\\b", "\f": "\\f", "\v": "\\v"}  # fmt: skip


def _go_quoted(text: str) -> str:
    """Quote as Go's %q does."""
    shown = ""
    for c in text:
        if c in _GO_ESCAPES:
            shown += _GO_ESCAPES[c]
        elif c.isprintable():
            shown += c
        else:
            number = ord(c)
            shown += f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
    return f'"{shown}"'


messages = Log()


def begin(call: OciCall) -> None:
    """Have every message from here on take the form of this call."""
    if call.apptainer:
        # Its log options are about the container's output.
        if call.debug:
            log.set_level(log.DEBUG)
        return
    log.writer = messages.write
    messages.open(call)
    if call.debug:
        log.set_level(log.DEBUG)


def show(error: ApptainerError, call: OciCall | None, *, apptainer: bool = False) -> int:
    """Say why a call fails; returns its exit status.

    `apptainer` tells whose words are meant where the call could not be understood.
    """
    text = str(error)
    if apptainer:
        from apptainer_py.cli.oci.apptainer import text_of

        log.writer = None
        if text:
            log.fatal(text_of(text, call) if call else text)
        return 255
    if call is None or not text:
        if text:
            messages.fatal(text)
        return 1
    prefix = _PREFIXES.get(call.command, "")
    if prefix.startswith("runc "):
        prefix = f"runc {call.command} failed: "
    messages.fatal(prefix + text)
    return 255 if call.command == "exec" else 1
