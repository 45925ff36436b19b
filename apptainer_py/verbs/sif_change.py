"""`sif new|add|del|setprim`: changes to a SIF file, in the words of Apptainer 1.4."""

from __future__ import annotations

import os
import time

from apptainer_py.base.errors import ImageError
from apptainer_py.base.record import Record
from apptainer_py.image import arch, sif, sif_edit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    Answer = TypeVar("Answer")

_ARCHITECTURES = tuple(arch.SIF_CODES.values())
_SBOMS = (
    "cyclonedx-json", "cyclonedx-xml", "github-json", "spdx-json", "spdx-rdf", "spdx-tag-value",
    "spdx-yaml", "syft-json",
)  # fmt: skip
_HASHES = range(1, 6)
_FINGERPRINT_BYTES = 20
_NUMBER_MAX = 0x0FFFFFFF
_FIRST_TYPE = 0x4000


class SifChangeFailed(ImageError):
    """A `sif` command found what it cannot work with, or cannot write."""

    message = 'Error for command "{command}": {reason}'
    exit_code = 1


class ObjectOptions(Record):
    """What the options of `sif add` say of the new object; 0 and "" where they say nothing."""

    datatype: int = 0
    partfs: int = 0
    parttype: int = 0
    partarch: int = 0
    groupid: int = 0
    link: int = 0
    alignment: int = 0
    filename: str = ""
    signhash: int = 0
    signentity: str = ""
    sbomformat: str = ""


def sif_new(path: str, *, epoch: int | None = None) -> None:
    """Make an empty SIF file; with `epoch`, in seconds since 1970, always the same one.

    Raises:
        SifChangeFailed: it cannot be written.
    """
    identity = b"" if epoch is None else bytes(16)
    _guarded("new", path, lambda: sif_edit.create(path, now_s=_now_s(epoch), identity=identity))


def sif_add(path: str, content: str, options: ObjectOptions, *, epoch: int | None = None) -> None:
    """Add the content of a file to a SIF file.

    Raises:
        SifChangeFailed: the options do not go together, or a file cannot be read or written.
    """
    source = _guarded("add", content, lambda: _open_content(content))
    try:
        new = _new_object(source, options)
        _changed("add", path, lambda fd: sif_edit.add(fd, (new,), now_s=_now_s(epoch)))
    finally:
        os.close(source)


def sif_del(path: str, ident: str, *, epoch: int | None = None) -> None:
    """Delete an object, named by its number in decimal digits.

    Raises:
        SifChangeFailed: no such object, or the file cannot be written.
    """
    number = _number("del", ident)
    _changed("del", path, lambda fd: sif_edit.delete(fd, number, now_s=_now_s(epoch)))


def sif_setprim(path: str, ident: str, *, epoch: int | None = None) -> None:
    """Make a system partition the primary one.

    Raises:
        SifChangeFailed: no such partition, or the file cannot be written.
    """
    number = _number("setprim", ident)
    _changed("setprim", path, lambda fd: sif_edit.set_primary(fd, number, now_s=_now_s(epoch)))


def _now_s(epoch: int | None) -> int:
    return int(time.time()) if epoch is None else epoch


def _failed(command: str, reason: str) -> SifChangeFailed:
    return SifChangeFailed(command=command, reason=reason)


def _guarded(command: str, path: str, action: Callable[[], Answer]) -> Answer:
    try:
        return action()
    except SifChangeFailed:
        raise
    except ImageError as error:
        raise _failed(command, str(error.facts["reason"])) from None
    except OSError as error:
        reason = f"open {path}: {(error.strerror or 'failed').lower()}"
        raise _failed(command, reason) from None
    except ValueError as error:
        raise _failed(command, f"open {path}: {error}") from None


def _changed(command: str, path: str, change: Callable[[int], object]) -> None:
    def carry_out() -> None:
        fd = sif_edit.open_to_change(path)
        try:
            change(fd)
        finally:
            os.close(fd)

    _guarded(command, path, carry_out)


def _open_content(path: str) -> int:
    import stat

    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ImageError(image=path, reason=f"{path} is not a regular file")
    return fd


def _number(command: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 0xFFFFFFFF:
        raise _failed(command, f"while converting id: {text!a} is no object's number")
    return int(text)


def _new_object(source: int, options: ObjectOptions) -> sif_edit.NewObject:
    name = os.fsencode(options.filename)
    if len(name) >= sif_edit.NAME_BYTES:
        raise _failed("add", "name value too large")
    for what, number in (("--groupid", options.groupid), ("--link", options.link)):
        if not 0 <= number <= _NUMBER_MAX:
            raise _failed("add", f"{what}: {number} is not between 0 and {_NUMBER_MAX}")
    data_type = options.datatype + _FIRST_TYPE
    if not sif.DEFFILE <= data_type <= sif.OCI_BLOB:
        raise _failed("add", "-datatype flag is required with a valid range")
    alignment = options.alignment
    if data_type == sif.PARTITION and not alignment:
        alignment = sif_edit.PARTITION_ALIGNMENT
    return sif_edit.NewObject(
        data_type=data_type,
        source=source,
        group=options.groupid,
        link=options.link,
        name=name,
        extra=_extra(data_type, source, options),
        alignment=alignment,
    )


def _extra(data_type: int, source: int, options: ObjectOptions) -> bytes:
    if data_type == sif.PARTITION:
        return _partition_extra(options)
    if data_type == sif.SIGNATURE:
        return _signature_extra(options)
    if data_type == sif.SBOM:
        if not options.sbomformat:
            raise _failed("add", "with SBOM datatype, --sbomformat must be passed")
        if options.sbomformat not in _SBOMS:
            raise _failed("add", f"invalid SBOM format: {ascii(options.sbomformat)[1:-1]}")
        return (_SBOMS.index(options.sbomformat) + 1).to_bytes(4, "little")
    if data_type in (sif.OCI_ROOT_INDEX, sif.OCI_BLOB):
        return b"sha256:" + _digest(source).encode()
    return b""


def _partition_extra(options: ObjectOptions) -> bytes:
    if not (options.partfs and options.parttype and options.partarch):
        reason = "with partition datatype, --partfs, --parttype and --partarch must be passed"
        raise _failed("add", reason)
    if not 1 <= options.partarch <= len(_ARCHITECTURES):
        raise _failed("add", "unknown architecture: unknown")
    if not sif.SQUASHFS <= options.partfs <= sif.GOCRYPTFS:
        raise _failed("add", f"unknown filesystem type: {options.partfs}")
    if not sif.SYSTEM <= options.parttype <= sif.OVERLAY:
        raise _failed("add", f"unknown partition type: {options.parttype}")
    architecture = _ARCHITECTURES[options.partarch - 1]
    return sif_edit.partition_extra(options.partfs, options.parttype, architecture)


def _signature_extra(options: ObjectOptions) -> bytes:
    if options.signhash not in _HASHES:
        raise _failed("add", f"invalid hash type: {options.signhash}")
    try:
        entity = bytes.fromhex(options.signentity)
    except ValueError:
        reason = f"failed to decode signing entity fingerprint: {options.signentity!a}"
        raise _failed("add", reason) from None
    if len(entity) != _FINGERPRINT_BYTES:
        reason = f"got {len(entity)}, want {_FINGERPRINT_BYTES}"
        raise _failed("add", f"invalid signing entity fingerprint length: {reason}")
    return sif_edit.signature_extra(options.signhash, entity)


def _digest(source: int) -> str:
    import hashlib

    state, at = hashlib.sha256(), 0
    while part := os.pread(source, 1 << 20, at):
        state.update(part)
        at += len(part)
    return state.hexdigest()
