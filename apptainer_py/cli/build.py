"""From a command line of `build` to its request, with the environment."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from apptainer_py.model.request import Parsed

# Passed on to the containers in which %post and %test run.
_REPEATED = ("bind", "mount")
_SWITCHES = ("nv", "nvccli", "rocm")
_OWN = (
    "build_arg", "build_arg_file", "fakeroot", "fix_perms", "force", "ignore_fakeroot_command",
    "ignore_subuid", "ignore_userns", "mksquashfs_args", "no_cleanup", "notest", "reproducible",
    "sandbox", "section", "tmpdir", "update", "warn_unused_build_args", "writable_tmpfs",
)  # fmt: skip


def run(parsed: Parsed) -> int:
    """Build an image; return the exit status.

    Raises:
        ApptainerError: it cannot be done.
    """
    from apptainer_py.base import build as facts
    from apptainer_py.builds import layered
    from apptainer_py.cli.images import fetching
    from apptainer_py.crypto import sealing
    from apptainer_py.verbs import build, inspect

    layered.register(fetching(parsed))

    options: dict[str, Any] = {
        name.replace("-", "_"): value for name, value in parsed.options.items()
    }
    passed: list[str] = []
    for name in _REPEATED:
        for value in options[name]:
            passed += [f"--{name}", value]
    passed += [f"--{name}" for name in _SWITCHES if options[name]]
    target, spec = parsed.arguments
    lock = sealing.find_lock(
        os.environ,  # noqa: TID251 cli is where it is read
        encrypt=options["encrypt"],
        pem_path=options["pem_path"],
        ask=_ask if options["passphrase"] else None,
    )
    request = build.Request(
        target=target,
        spec=spec,
        environ=sealing.without_secrets(environment()),
        lock=lock,
        config_file=parsed.config_file or facts.CONFIG_FILE,
        container_options=tuple(passed),
        **{name: options[name] for name in _OWN},
    )

    def describe(root: str) -> str:
        return inspect.inspect(root, inspect.Wanted(all=True)).text

    build.build(request, describe)
    return 0


def _ask() -> str:
    """Return a passphrase that is typed, at a terminal twice.

    Raises:
        CannotEncrypt: it was not typed the same way again.
    """
    import sys

    from apptainer_py.cli import ask
    from apptainer_py.crypto.sealing import CannotEncrypt

    typed = ask.ask_hidden("Enter encryption passphrase: ")
    if sys.stdin.isatty() and typed != ask.ask_hidden("Retype encryption passphrase: "):
        raise CannotEncrypt(reason="Invalid encryption passphrase: passphrases do not match")
    return typed


def environment() -> dict[str, str]:
    """Return the caller's environment without what would change the containers of a build."""
    unwanted = ("APPTAINER_BIND", "SINGULARITY_BIND", "APPTAINERENV_", "SINGULARITYENV_")
    found = dict(os.environ)  # noqa: TID251 cli is where it is read
    return {name: value for name, value in found.items() if not name.startswith(unwanted)}
