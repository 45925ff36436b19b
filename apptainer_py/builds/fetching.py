"""What a command line says about fetching; it loads nothing of what fetching takes."""

from __future__ import annotations

from apptainer_py.base.record import Record


class Fetching(Record):
    """How images are fetched: a field for each option of the command line."""

    no_https: bool = False
    authfile: str = ""
    docker_username: str = ""
    docker_password: str = ""
    docker_host: str = ""
    disable_cache: bool = False
    library: str = ""
    arch: str = ""
    arch_variant: str = ""
    tmpdir: str = ""

    def __repr__(self) -> str:
        return "Fetching()"
