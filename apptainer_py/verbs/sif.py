"""`sif list|header|info|dump`: what is inside a SIF file, as Apptainer 1.4 prints it.

What a file says about itself is shown even where it is impossible (offsets beyond the end);
only control characters are shown as escapes, since the text goes to a terminal.
"""

from __future__ import annotations

import os
import stat

from apptainer_py.base.errors import ImageError
from apptainer_py.image import sif

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeVar

    Answer = TypeVar("Answer")

_RULE = "-" * 78
_DUMP_BYTES = 1 << 20

_TYPES = {
    sif.DEFFILE: "Def.FILE",
    sif.ENV_VARS: "Env.Vars",
    sif.LABELS: "JSON.Labels",
    sif.PARTITION: "FS",
    sif.SIGNATURE: "Signature",
    sif.GENERIC_JSON: "JSON.Generic",
    sif.GENERIC: "Generic/Raw",
    sif.CRYPTO_MESSAGE: "Cryptographic Message",
    sif.SBOM: "SBOM",
    sif.OCI_ROOT_INDEX: "OCI.RootIndex",
    sif.OCI_BLOB: "OCI.Blob",
}
_FILE_SYSTEMS = {
    sif.SQUASHFS: "Squashfs",
    sif.EXT3: "Ext3",
    sif.ARCHIVE: "Archive",
    sif.RAW: "Raw",
    sif.ENCRYPTED_SQUASHFS: "Encrypted squashfs",
    sif.GOCRYPTFS: "Gocryptfs squashfs",
}
_PART_TYPES = {
    sif.SYSTEM: "System",
    sif.PRIMARY_SYSTEM: "*System",
    sif.DATA: "Data",
    sif.OVERLAY: "Overlay",
}
_HASHES = {1: "SHA-256", 2: "SHA-384", 3: "SHA-512", 4: "BLAKE2s-256", 5: "BLAKE2b-256"}
_FORMATS = {1: "OpenPGP", 2: "PEM"}
_MESSAGES = {0x100: "Clear Signature", 0x200: "RSA-OAEP"}
_SBOMS = {
    1: "cyclonedx-json",
    2: "cyclonedx-xml",
    3: "github-json",
    4: "spdx-json",
    5: "spdx-rdf",
    6: "spdx-tag-value",
    7: "spdx-yaml",
    8: "syft-json",
}
_UNKNOWN = "Unknown"


class SifCommandFailed(ImageError):
    """A `sif` command found no such file, no SIF file or no such object."""

    message = 'Error for command "{command}": {reason}'
    exit_code = 1


def sif_list(path: str) -> str:
    """Return the table of objects.

    Raises:
        SifCommandFailed: no such file, or no SIF file.
    """
    return _with_file("list", path, lambda fd: _table(sif.read_descriptors(fd)))


def sif_header(path: str) -> str:
    """Return the global header.

    Raises:
        SifCommandFailed: no such file, or no SIF file.
    """
    return _with_file("header", path, lambda fd: _columns("", 1, _header_rows(_loaded_header(fd))))


def sif_info(path: str, ident: str) -> str:
    """Return what the table says about one object, named by its number in decimal digits.

    Raises:
        SifCommandFailed: no number, no such object, no such file, or no SIF file.
    """
    number = _number("info", ident)

    def answer(fd: int) -> str:
        entry = sif.find_object(sif.read_descriptors(fd), number)
        return _columns("  ", 2, [*_common_rows(entry), *_extra_rows(entry)])

    return _with_file("info", path, answer)


def sif_dump(path: str, ident: str, write: Callable[[bytes], object]) -> None:
    """Pass the content of one object to `write`, in pieces.

    Raises:
        SifCommandFailed: as `sif_info`, or the object is not all inside the file.
    """
    number = _number("dump", ident)

    def answer(fd: int) -> None:
        entry = sif.find_object(sif.read_descriptors(fd), number)
        sif.check_inside(fd, entry)
        at, end = entry.offset, entry.offset + entry.size_bytes
        while at < end:
            piece = os.pread(fd, min(_DUMP_BYTES, end - at), at)
            if not piece:
                raise ImageError(image=path, reason="EOF")
            write(piece)
            at += len(piece)

    _with_file("dump", path, answer)


def sif_list_json(path: str) -> str:
    """Return header and objects as one JSON document (not in Apptainer).

    Raises:
        SifCommandFailed: no such file, or no SIF file.
    """
    import json

    def answer(fd: int) -> str:
        header = _loaded_header(fd)
        document = {
            "header": _json_rows(_header_rows(header)),
            "objects": [
                _json_rows([*_common_rows(entry), *_extra_rows(entry)])
                for entry in sif.read_descriptors(fd, header)
            ],
        }
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"

    return _with_file("list", path, answer)


def _with_file(command: str, path: str, answer: Callable[[int], Answer]) -> Answer:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        raise SifCommandFailed(command=command, reason=f"open {path}: {_words(error)}") from None
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            reason = f"reading global header: read {path}: is a directory"
            raise SifCommandFailed(command=command, reason=reason)
        if not stat.S_ISREG(mode):
            raise SifCommandFailed(command=command, reason=f"{path} is not a regular file")
        return answer(fd)
    except SifCommandFailed:
        raise
    except ImageError as error:
        raise SifCommandFailed(command=command, reason=error.facts["reason"]) from None
    except OSError as error:
        raise SifCommandFailed(command=command, reason=f"read {path}: {_words(error)}") from None
    finally:
        os.close(fd)


def _words(error: OSError | ValueError) -> str:
    return (error.strerror or "").lower() if isinstance(error, OSError) else str(error)


def _number(command: str, text: str) -> int:
    trouble = None
    if not text.isascii() or not text.isdigit():
        trouble = "invalid syntax"
    elif len(text.lstrip("0")) > 10 or int(text) > 0xFFFFFFFF:
        trouble = "value out of range"
    if trouble:
        shown = '"' + _shown(text.encode("utf-8", "surrogateescape")) + '"'
        reason = f"while converting id: strconv.ParseUint: parsing {shown}: {trouble}"
        raise SifCommandFailed(command=command, reason=reason)
    return int(text)


def _loaded_header(fd: int) -> sif.Header:
    header = sif.read_header(fd)
    sif.read_descriptors(fd, header)
    return header


def _table(objects: tuple[sif.Descriptor, ...]) -> str:
    lines = [_RULE, "ID   |GROUP   |LINK    |SIF POSITION (start-end)  |TYPE", _RULE]
    for entry in objects:
        group = str(entry.group) if entry.group else "NONE"
        link = f"{entry.link:<7}"
        if not entry.link:
            link = "NONE   "
        elif entry.link_is_group:
            link = f"{entry.link:<3} (G)"
        where = f"{entry.offset}-{entry.offset + entry.size_bytes}"
        lines.append(f"{entry.id:<4} |{group:<7} |{link} |{where:<24}  |{_type_text(entry)}")
    return "\n".join(lines) + "\n"


def type_name(entry: sif.Descriptor) -> str:
    """Return what kind of object this is."""
    return _TYPES.get(entry.data_type, _UNKNOWN)


def _type_text(entry: sif.Descriptor) -> str:
    text = _TYPES.get(entry.data_type, _UNKNOWN)
    first, second = _two_numbers(entry)
    if entry.data_type == sif.PARTITION:
        fs, part_type, machine = sif.partition_facts(entry)
        file_system = _FILE_SYSTEMS.get(fs, _UNKNOWN)
        return f"{text} ({file_system}/{_PART_TYPES.get(part_type, _UNKNOWN)}/{machine})"
    if entry.data_type == sif.SIGNATURE:
        return f"{text} ({_HASHES.get(first, _UNKNOWN)})"
    if entry.data_type == sif.CRYPTO_MESSAGE:
        return f"{text} ({_FORMATS.get(first, _UNKNOWN)}/{_MESSAGES.get(second, _UNKNOWN)})"
    if entry.data_type == sif.SBOM:
        return f"{text} ({_SBOMS.get(first, _UNKNOWN.lower())})"
    return text


def _two_numbers(entry: sif.Descriptor) -> tuple[int, int]:
    return int.from_bytes(entry.extra[:4], "little"), int.from_bytes(entry.extra[4:8], "little")


def _header_rows(header: sif.Header) -> Iterator[tuple[str, str]]:
    if header.launch:
        yield "Launch Script", _shown(header.launch.removesuffix(b"\n"))
    yield "Version", _shown(header.version)
    machine = sif.arch_name(header.arch)
    if machine != "unknown":
        yield "Primary Architecture", machine
    h = header.id.hex()
    yield "ID", f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"
    yield "Created At", _time_text(header.created_s)
    yield "Modified At", _time_text(header.modified_s)
    yield "Descriptors Free", str(header.descriptors_free)
    yield "Descriptors Total", str(header.descriptors_total)
    yield "Descriptors Offset", str(header.descriptors_offset)
    yield "Descriptors Size", _size_text(header.descriptors_bytes)
    yield "Data Offset", str(header.data_offset)
    yield "Data Size", _size_text(header.data_bytes)


def _common_rows(entry: sif.Descriptor) -> Iterator[tuple[str, str]]:
    yield "Data Type", _TYPES.get(entry.data_type, _UNKNOWN)
    yield "ID", str(entry.id)
    yield "Group ID", str(entry.group) if entry.group else "NONE"
    link = f"{entry.link} (G)" if entry.link_is_group else str(entry.link)
    yield "Linked ID", link if entry.link else "NONE"
    yield "Offset", str(entry.offset)
    yield "Size", str(entry.size_bytes)
    yield "Created At", _time_text(entry.created_s)
    yield "Modified At", _time_text(entry.modified_s)
    if entry.name:
        yield "Name", _shown(entry.name)


def _extra_rows(entry: sif.Descriptor) -> Iterator[tuple[str, str]]:
    first, second = _two_numbers(entry)
    if entry.data_type == sif.PARTITION:
        fs, part_type, machine = sif.partition_facts(entry)
        yield "Filesystem Type", _FILE_SYSTEMS.get(fs, _UNKNOWN)
        yield "Partition Type", _PART_TYPES.get(part_type, _UNKNOWN)
        yield "Architecture", machine
    elif entry.data_type == sif.SIGNATURE:
        yield "Hash Type", _HASHES.get(first, _UNKNOWN)
        yield "Entity", entry.extra[4:24].hex().upper()
    elif entry.data_type == sif.CRYPTO_MESSAGE:
        yield "Format Type", _FORMATS.get(first, _UNKNOWN)
        yield "Message Type", _MESSAGES.get(second, _UNKNOWN)
    elif entry.data_type == sif.SBOM:
        yield "Format", _SBOMS.get(first, _UNKNOWN.lower())
    elif entry.data_type in (sif.OCI_ROOT_INDEX, sif.OCI_BLOB):
        yield "Digest", _shown(entry.extra.rstrip(b"\0"))


def _columns(indent: str, gap: int, rows: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> str:
    pairs = [(f"{label}:", value) for label, value in rows]
    width = max(len(label) for label, _ in pairs) + gap
    return "".join(f"{indent}{label:<{width}}{value}\n" for label, value in pairs)


def _json_rows(rows: Iterator[tuple[str, str]] | list[tuple[str, str]]) -> dict[str, str]:
    return {label.lower().replace(" ", "_"): value for label, value in rows}


def _shown(raw: bytes) -> str:
    text = raw.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _size_text(size_bytes: int) -> str:
    size, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}"


def _time_text(seconds: int) -> str:
    # `datetime` ends with the year 9999; the file's 64 bits do not (proleptic Gregorian days).
    days, rest = divmod(seconds, 86400)
    era, day = divmod(days + 719468, 146097)
    year = (day - day // 1460 + day // 36524 - day // 146096) // 365
    day -= 365 * year + year // 4 - year // 100
    shifted = (5 * day + 2) // 153
    month = shifted + 3 if shifted < 10 else shifted - 9
    year += era * 400 + (month <= 2)
    clock = f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
    shown = f"-{-year:04}" if year < 0 else f"{year:04}"
    return f"{shown}-{month:02}-{day - (153 * shifted + 2) // 5 + 1:02} {clock} +0000 UTC"
