"""`oci mount` and `oci umount`: a SIF image as a bundle, and away again.

BUNDLE/rootfs       the image, with BUNDLE/overlay over it: what is written stays there
BUNDLE/volumes      a directory for each volume that the image names
BUNDLE/config.json  a configuration to begin with
"""

from __future__ import annotations

import os
import posixpath

from apptainer_py.base.files import read_at_most, write_all
from apptainer_py.engines.oci.base_spec import specification
from apptainer_py.image import sif
from apptainer_py.image.detect import open_image
from apptainer_py.image.oci_config import CONFIG_BYTES, ImageConfig, parse_config
from apptainer_py.image.oci_user import User, find_user
from apptainer_py.kernel import _container, _starter
from apptainer_py.runtime.containers import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from apptainer_py.model.oci_call import OciCall

_RUN = "/.singularity.d/actions/run"
_OCI_CONFIG = b"oci-config.json"
_MS_RDONLY, _MS_NODEV, _MNT_DETACH = 1, 4, 2
_LOOP_CTL_GET_FREE, _LOOP_CONFIGURE = 0x4C82, 0x4C0A
_LO_READ_ONLY, _LO_AUTOCLEAR = 1, 4
_LOOP_CONFIG_BYTES, _LOOP_TRIES = 304, 32
_EBUSY = 16
_FILE_BYTES = 1 << 20
_TABLE_BYTES = 64 << 20
_RESOLVE_IN_ROOT = 0x10
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CAPABILITIES = [
    "CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL",
    "CAP_MKNOD", "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID",
    "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
]  # fmt: skip


class RootOnly(ContainerError):
    """Mounting on the host is root's business."""

    message = '"apptainer-py oci {command}" command requires root privileges'


def mount(call: OciCall, environment: Mapping[str, str]) -> str:
    """Make a bundle of a SIF image; nothing of it is left if that fails.

    Raises:
        ApptainerError: the caller is not root, the image is none, or it cannot be mounted.
    """
    _check_root("mount")
    image, bundle = call.arguments[0], os.path.realpath(call.arguments[1])
    opened = open_image(image)
    if opened.kind != "sif":
        raise ContainerError(text=f"{image} is no SIF image")
    partition = sif.primary_partition(opened.fd)
    if partition.fs != "squashfs":
        text = f"{image}: a root file system of type {partition.fs} cannot be mounted"
        raise ContainerError(text=text)
    config = _image_config(opened.fd, image)
    # The system call takes layers in one string, where these have a meaning of their own.
    if not all(c.isprintable() and c not in ' :,\\"' for c in bundle):
        raise ContainerError(text=f"{bundle}: the bundle's path has a character that overlay lacks")
    made: list[str] = []
    try:
        _make_directories(bundle, made)
        _mount_root(opened.fd, partition, bundle)
        try:
            user = _user_of(config, f"{bundle}/rootfs", image)
            _write_config(bundle, config, user, made)
        except BaseException:
            _unmount(bundle)
            raise
    except OSError as error:
        _remove(made)
        place = error.filename or bundle
        place = os.fsdecode(place) if isinstance(place, bytes) else place
        text = f"cannot mount {image} on {bundle}: {place}: {(error.strerror or '').lower()}"
        raise ContainerError(text=text) from None
    except BaseException:
        _remove(made)
        raise
    return ""


def umount(call: OciCall, environment: Mapping[str, str]) -> str:
    """Undo `oci mount`: mounts, what was written over the image, the configuration.

    Raises:
        ContainerError: the caller is not root, or there is no such bundle.
    """
    _check_root("umount")
    bundle = os.path.realpath(call.arguments[0])
    if not _is_ours(bundle):
        raise ContainerError(text=f"{bundle} is no bundle that `oci mount` has made")
    try:
        _unmount(bundle)
        from shutil import rmtree

        for name in ("overlay", "volumes"):
            # It does not follow links, and names them by descriptor.
            if os.path.isdir(f"{bundle}/{name}"):
                rmtree(f"{bundle}/{name}")
        os.rmdir(f"{bundle}/rootfs")
        os.unlink(f"{bundle}/config.json")
    except FileNotFoundError:
        pass
    except OSError as error:
        text = f"cannot umount {bundle}: {error.filename}: {(error.strerror or '').lower()}"
        raise ContainerError(text=text) from None
    try:
        os.rmdir(bundle)
    except OSError:
        pass  # the directory was there before, or holds something of its owner's
    return ""


def _check_root(command: str) -> None:
    if os.geteuid() != 0:
        raise RootOnly(command=command)


def _image_config(fd: int, image: str) -> ImageConfig | None:
    for entry in sif.read_descriptors(fd):
        if entry.data_type == sif.GENERIC_JSON and entry.name == _OCI_CONFIG:
            return parse_config(sif.read_object(fd, entry, limit_bytes=CONFIG_BYTES), image=image)
    return None


# -- directories and mounts


def _make_directories(bundle: str, made: list[str]) -> None:
    if not os.path.isdir(bundle):
        os.mkdir(bundle, 0o700)
        made.append(bundle)
    # All that follows goes by path: nobody else may exchange what lies on it.
    found = os.stat(bundle, follow_symlinks=False)
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        text = f"{bundle} is no directory of your own that nobody else can write to"
        raise ContainerError(text=text)
    if os.path.lexists(f"{bundle}/config.json"):
        raise ContainerError(text=f"{bundle} is a bundle already: it has a config.json")
    for name in ("rootfs", "overlay", "overlay/upper", "overlay/work"):
        os.mkdir(f"{bundle}/{name}", 0o755)
        made.append(f"{bundle}/{name}")


def _remove(made: list[str]) -> None:
    for path in reversed(made):
        try:
            if path.endswith("/work"):
                os.rmdir(f"{path}/work")
        except OSError:
            pass
        try:
            os.unlink(path) if path.endswith(".json") else os.rmdir(path)
        except OSError:
            continue


def _loop_device(fd: int, offset: int, size: int) -> tuple[int, str]:
    """Return an open loop device, which goes when its last user does, and its path (loop(4))."""
    import fcntl
    import struct

    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_LOOP_TRIES):
            path = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            # struct loop_config: fd, block size, then loop_info64
            info = struct.pack(
                "=QQQQQIIII", 0, 0, 0, offset, size, 0, 0, 0, _LO_READ_ONLY | _LO_AUTOCLEAR
            )
            config = (struct.pack("=II", fd, 0) + info).ljust(_LOOP_CONFIG_BYTES, b"\0")
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
            except OSError as error:
                os.close(device)
                if error.errno != _EBUSY:
                    raise OSError(error.errno, error.strerror, path) from None
                continue  # somebody else took it
            return device, path
    finally:
        os.close(control)
    raise ContainerError(text="there is no free loop device")


def _mount_root(fd: int, partition: sif.Partition, bundle: str) -> None:
    rootfs = os.fsencode(f"{bundle}/rootfs")
    device, path = _loop_device(fd, partition.offset, partition.size_bytes)
    try:
        _container.mount(path.encode(), rootfs, b"squashfs", _MS_RDONLY | _MS_NODEV, None)
    finally:
        os.close(device)
    try:
        upper, work = f"{bundle}/overlay/upper", f"{bundle}/overlay/work"
        found = os.stat(rootfs)
        os.chown(upper, found.st_uid, found.st_gid)
        os.chmod(upper, found.st_mode & 0o7777)
        data = f"lowerdir={bundle}/rootfs,upperdir={upper},workdir={work}"
        _container.mount(b"overlay", rootfs, b"overlay", _MS_NODEV, os.fsencode(data))
    except BaseException:
        _container.umount2(rootfs, _MNT_DETACH)
        raise


def _is_mounted(path: str) -> bool:
    try:
        return os.stat(path).st_dev != os.stat(f"{path}/..").st_dev
    except OSError:
        return False


def _is_ours(bundle: str) -> bool:
    """Return whether the mount on rootfs is an overlay with the bundle's own upper layer."""
    data = read_at_most(os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC), _TABLE_BYTES)
    upper = os.fsencode(f"upperdir={bundle}/overlay/upper")
    for line in data.splitlines():
        fields, _, rest = line.partition(b" - ")
        words = fields.split()
        if len(words) < 5 or words[4] != os.fsencode(f"{bundle}/rootfs"):
            continue
        kind, _, options = rest.partition(b" ")
        if kind == b"overlay" and upper in options.rpartition(b" ")[2].split(b","):
            return True
    return False


def _unmount(bundle: str) -> None:
    """The overlay, then the image below it."""
    rootfs = f"{bundle}/rootfs"
    for _ in range(2):
        if _is_mounted(rootfs):
            _container.umount2(os.fsencode(rootfs), 0)


# -- config.json


def _user_of(config: ImageConfig | None, rootfs: str, image: str) -> User:
    if config is None or not config.user:
        return User()
    root = os.open(rootfs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        files = [_read_in(root, name) for name in (b"etc/passwd", b"etc/group")]
    finally:
        os.close(root)
    return find_user(config.user, *files, image=image)


def _read_in(root: int, path: bytes) -> bytes:
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = _starter.openat2(root, path, flags, _RESOLVE_IN_ROOT)
    except OSError:
        return b""
    try:
        return os.pread(fd, _FILE_BYTES, 0)
    except OSError:
        return b""
    finally:
        os.close(fd)


def _write_config(bundle: str, image: ImageConfig | None, user: User, made: list[str]) -> None:
    import json

    config = _specification(image, user)
    config["mounts"] += _volumes(bundle, image, made)
    data = json.dumps(config, indent="\t").encode() + b"\n"
    path = f"{bundle}/config.json"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    made.append(path)
    write_all(fd, data)


def _volumes(bundle: str, image: ImageConfig | None, made: list[str]) -> list[dict[str, Any]]:
    found = []
    for target in image.volumes if image else ():
        clean = posixpath.normpath(posixpath.join("/", target))
        source = f"{bundle}/volumes/{clean.replace('/', '_')}"
        for path in (f"{bundle}/volumes", source):
            if not os.path.isdir(path):
                os.mkdir(path, 0o755)
                made.append(path)
        found.append(
            {"destination": clean, "type": "bind", "source": source, "options": ["rbind", "rw"]}
        )
    return found


def _specification(image: ImageConfig | None, user: User) -> dict[str, Any]:
    arguments = [*image.entrypoint, *image.command] if image else []
    environment = {"PATH": _PATH[5:], "TERM": "xterm"}
    for entry in image.environment if image else ():
        name, _, value = entry.partition("=")
        environment[name] = value
    directory = (image.directory if image else "") or "/"
    config = specification()
    config["process"].update(
        user={"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)},
        args=arguments or [_RUN],
        env=[f"{name}={value}" for name, value in environment.items()],
        cwd=posixpath.normpath(posixpath.join("/", directory)),
        capabilities=dict.fromkeys(("bounding", "effective", "permitted"), _CAPABILITIES),
        noNewPrivileges=False,
    )
    config["root"]["readonly"] = False
    return config
