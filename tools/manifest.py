"""The list of what an installation put on the machine, so that all of it can be removed again.

One line per path: kind (`file`, `config` or `directory`), SHA-256 (`-` for a directory), path.
"""

from __future__ import annotations

import hashlib
import os

KINDS = ("file", "config", "directory")


class BadManifest(Exception):
    """A list that no installation wrote."""


class Manifest:
    """What is installed: files and configuration with their digests, directories that we made."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.configs: dict[str, str] = {}
        self.directories: set[str] = set()

    def text(self) -> str:
        """Return the lines of the list, sorted by path within each kind."""
        lines = [f"file {digest} {path}" for path, digest in sorted(self.files.items())]
        lines += [f"config {digest} {path}" for path, digest in sorted(self.configs.items())]
        lines += [f"directory - {path}" for path in sorted(self.directories)]
        return "".join(f"{line}\n" for line in lines)

    @classmethod
    def parse(cls, text: str) -> Manifest:
        """Read such a list.

        Raises:
            BadManifest: a line is not of the form that `text` writes.
        """
        made = cls()
        for line in text.splitlines():
            kind, _, rest = line.partition(" ")
            digest, _, path = rest.partition(" ")
            if kind not in KINDS or not path.startswith("/") or os.path.normpath(path) != path:
                raise BadManifest(f"not a line of a manifest: {line!r}")
            if kind == "directory":
                made.directories.add(path)
            else:
                (made.files if kind == "file" else made.configs)[path] = digest
        return made

    @classmethod
    def load(cls, path: str) -> Manifest:
        """Read the list of an installation; an absent one is empty.

        Raises:
            BadManifest: as `parse`.
        """
        try:
            with open(path, encoding="utf-8") as stream:
                return cls.parse(stream.read())
        except FileNotFoundError:
            return cls()


def digest_of(path: str) -> str:
    """Return the SHA-256 of a file's content in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
