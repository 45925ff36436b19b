"""What every image has below `/.singularity.d`, and the directories that a launch mounts things on.

The names are Apptainer's, and so is what they do; older programs of the family start an image
through `actions/`.
"""

from __future__ import annotations

import os
import stat

from apptainer_py.base.errors import ApptainerError
from apptainer_py.kernel import _starter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

META = ".singularity.d"
FOLDERS = (
    f"{META}/libs", f"{META}/actions", f"{META}/env", "dev", "proc", "root", "var/tmp", "tmp",
    "etc", "sys", "home",
)  # fmt: skip
LINKS: Mapping[str, str] = {
    ".exec": f"{META}/actions/exec",
    ".run": f"{META}/actions/run",
    ".shell": f"{META}/actions/shell",
    ".test": f"{META}/actions/test",
    "environment": f"{META}/env/90-environment.sh",
    "singularity": f"{META}/runscript",
}
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 0x04, 0x08
_TEXT_BYTES = 16 << 20
EMPTY_FILES = ("etc/hosts", "etc/resolv.conf")

_SOURCE = """\
#!/bin/sh

for script in /.singularity.d/env/*.sh; do
    [ -f "$script" ] && . "$script"
done
"""
_EXEC = _SOURCE + '\nexec "$@"\n'
_RUN = (
    _SOURCE
    + """
if [ -n "${SINGULARITY_APPNAME:-}" ]; then
    start="/scif/apps/$SINGULARITY_APPNAME/scif/runscript"
    [ -x "$start" ] || { echo "No runscript for the application $SINGULARITY_APPNAME" >&2; exit 1; }
    exec "$start" "$@"
fi
[ -x /.singularity.d/runscript ] && exec /.singularity.d/runscript "$@"
exec /bin/sh "$@"
"""
)
_SHELL = (
    _SOURCE
    + """
if [ -n "${SINGULARITY_SHELL:-}" ] && [ -x "$SINGULARITY_SHELL" ]; then
    exec "$SINGULARITY_SHELL" "$@"
fi
if [ -x /bin/bash ]; then
    export SHELL=/bin/bash
    exec /bin/bash --norc "$@"
fi
export SHELL=/bin/sh
exec /bin/sh "$@"
"""
)
_START = (
    _SOURCE
    + """
[ -x /.singularity.d/startscript ] && exec /.singularity.d/startscript "$@"
"""
)
_TEST = (
    _SOURCE
    + """
if [ -n "${SINGULARITY_APPNAME:-}" ]; then
    start="/scif/apps/$SINGULARITY_APPNAME/scif/test"
    [ -x "$start" ] || { echo "No tests for the application $SINGULARITY_APPNAME" >&2; exit 1; }
    exec "$start" "$@"
fi
[ -x /.singularity.d/test ] && exec /.singularity.d/test "$@"
exit 0
"""
)
ACTIONS: Mapping[str, str] = {
    "exec": _EXEC, "run": _RUN, "shell": _SHELL, "start": _START, "test": _TEST,
}  # fmt: skip

_APPS = """\
#!/bin/sh

if [ -n "${SINGULARITY_APPNAME:-}" ]; then
    SCIF_APPS=/scif/apps
    SCIF_APPROOT="/scif/apps/$SINGULARITY_APPNAME"
    if [ ! -d "$SCIF_APPROOT" ]; then
        echo "Could not locate the container application: $SINGULARITY_APPNAME"
        exit 1
    fi
    PATH="$SCIF_APPROOT:$PATH"
    if [ -d "$SCIF_APPROOT/bin" ]; then
        PATH="$SCIF_APPROOT/bin:$PATH"
    fi
    if [ -d "$SCIF_APPROOT/lib" ]; then
        LD_LIBRARY_PATH="$SCIF_APPROOT/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
        export LD_LIBRARY_PATH
    fi
    if [ -f "$SCIF_APPROOT/scif/env/01-base.sh" ]; then
        . "$SCIF_APPROOT/scif/env/01-base.sh"
    fi
    if [ -f "$SCIF_APPROOT/scif/env/90-environment.sh" ]; then
        . "$SCIF_APPROOT/scif/env/90-environment.sh"
    fi
    export SINGULARITY_APPNAME SCIF_APPS SCIF_APPROOT PATH
fi
"""
_BASE = """\
#!/bin/sh

if [ -z "${LD_LIBRARY_PATH:-}" ]; then
    LD_LIBRARY_PATH="/.singularity.d/libs"
else
    LD_LIBRARY_PATH="$LD_LIBRARY_PATH:/.singularity.d/libs"
fi
if [ -z "${PS1:-}" ]; then
    PS1="Apptainer> "
fi
export LD_LIBRARY_PATH PS1
"""
_RUNTIME = """\
#!/bin/sh

if [ -n "${SING_USER_DEFINED_PREPEND_PATH:-}" ]; then
    PATH="${SING_USER_DEFINED_PREPEND_PATH}:${PATH}"
fi
if [ -n "${SING_USER_DEFINED_APPEND_PATH:-}" ]; then
    PATH="${PATH}:${SING_USER_DEFINED_APPEND_PATH}"
fi
if [ -n "${SING_USER_DEFINED_PATH:-}" ]; then
    PATH="${SING_USER_DEFINED_PATH}"
fi
unset SING_USER_DEFINED_PREPEND_PATH SING_USER_DEFINED_APPEND_PATH SING_USER_DEFINED_PATH
export PATH
"""
# Written anew each time, as the program that starts the image may rely on them.
OURS: Mapping[str, str] = {
    "env/95-apps.sh": _APPS,
    "env/99-base.sh": _BASE,
    "env/99-runtimevars.sh": _RUNTIME,
    **{f"actions/{name}": text for name, text in ACTIONS.items()},
}
# The image's own, where it has one.
DEFAULTS: Mapping[str, str] = {
    "env/01-base.sh": "#!/bin/sh\n",
    "env/90-environment.sh": "#!/bin/sh\n# Custom environment shell code should follow\n",
    "env/94-appsbase.sh": "",
    "runscript": '#!/bin/sh\necho "There is no runscript defined for this container"\n',
    "startscript": "#!/bin/sh\n",
}


class LinkInTheWay(ApptainerError):
    """A base, or its %post, has put a link where the metadata of the image belongs."""

    message = "While performing build: /{path} of the image cannot be used: {reason}"


def _open_folder(root: str, path: str) -> int:
    """Return a directory of the image; no component may be a link, which could lead outside."""
    at = os.open(root, _DIRECTORY)
    try:
        resolve = _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS
        return _starter.openat2(at, os.fsencode(path) or b".", _DIRECTORY, resolve)
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        raise LinkInTheWay(path=path, reason=reason) from None
    finally:
        os.close(at)


def write(root: str, path: str, text: str, mode: int) -> None:
    """Put a file of the image where something else may be: replaced, and never written through.

    Raises:
        LinkInTheWay: its directory is reached by a link, or is none.
    """
    folder, _, name = path.rpartition("/")
    at = _open_folder(root, folder)
    try:
        partial = f".{name}.{os.urandom(4).hex()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(partial, flags, 0o600, dir_fd=at), "wb") as file:
            file.write(text.encode("utf-8", "surrogateescape"))
            os.fchmod(file.fileno(), mode)
        os.rename(partial, name, src_dir_fd=at, dst_dir_fd=at)
    finally:
        os.close(at)


def read(root: str, path: str) -> str:
    """Return the text of a regular file of the image; "" where there is none, or a link."""
    resolve = _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS
    at = os.open(root, _DIRECTORY)
    try:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        fd = _starter.openat2(at, os.fsencode(path), flags, resolve)
    except OSError:
        return ""
    finally:
        os.close(at)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        return ""
    with open(fd, encoding="utf-8", errors="surrogateescape") as file:
        return file.read(_TEXT_BYTES)


def make_folder(root: str, path: str) -> None:
    """Make a directory of the image and those above it, those of the metadata never by a link."""
    parts = path.split("/")
    for depth in range(1, len(parts) + 1):
        at = _open_folder(root, "/".join(parts[: depth - 1]))
        try:
            name = parts[depth - 1]
            try:
                os.mkdir(name, 0o755, dir_fd=at)
            except FileExistsError:
                continue
            os.chmod(name, 0o755, dir_fd=at)
        finally:
            os.close(at)


def make(root: str) -> None:
    """Bring a root directory what every image has; what the image brought of its own stays.

    Raises:
        OSError: it cannot be written.
    """
    for folder in FOLDERS:
        _folder(root, folder)
    for name in EMPTY_FILES:
        if not os.path.islink(f"{root}/etc") and not os.path.lexists(f"{root}/{name}"):
            write(root, name, "", 0o644)
    for name, text in OURS.items():
        write(root, f"{META}/{name}", text, 0o755)
    for name, text in DEFAULTS.items():
        if not os.path.lexists(f"{root}/{META}/{name}"):
            write(root, f"{META}/{name}", text, 0o755)
    for name, target in LINKS.items():
        path = f"{root}/{name}"
        if os.path.islink(path):
            os.unlink(path)
        if not os.path.lexists(path):
            os.symlink(target, path)


def _folder(root: str, path: str) -> None:
    """Make a directory; a link of the base is left to whoever follows it inside."""
    parts = path.split("/")
    for depth in range(1, len(parts) + 1):
        if os.path.islink(f"{root}/{'/'.join(parts[:depth])}"):
            return
    make_folder(root, path)
