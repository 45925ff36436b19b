"""Names of images in registries, as `docker://` and `oras://` take them."""

from __future__ import annotations

import re

from apptainer_py.base.errors import ApptainerError
from apptainer_py.base.record import Record

# Of Docker's own registry there are three names: people's, that of its accounts, the server's.
DOCKER_HUB = "docker.io"
_DOCKER_SERVER = "registry-1.docker.io"
_DOCKER_NAMES = (DOCKER_HUB, "index.docker.io", "registry.hub.docker.com", _DOCKER_SERVER)
DOCKER_ACCOUNT = "https://index.docker.io/v1/"

# Distribution specification, "Pulling manifests".
_REPOSITORY = re.compile(
    r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*"
)
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_HOST = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
)
_REPOSITORY_MOST = 255


class BadReference(ApptainerError):
    """What was given names no image."""

    message = "{name} is no name of an image: {reason}"
    hint = "a name is [HOST[:PORT]/]REPOSITORY[:TAG][@sha256:DIGEST], in lower case"


class Reference(Record):
    """An image in a registry; `tag` or `digest` may be empty, not both."""

    host: str
    repository: str
    tag: str = ""
    digest: str = ""

    @property
    def server(self) -> str:
        """The host and port that answers."""
        return _DOCKER_SERVER if self.host == DOCKER_HUB else self.host

    @property
    def wanted(self) -> str:
        """What the manifest is asked for by: the digest where there is one."""
        return self.digest or self.tag

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.host}/{self.repository}{tag}{'@' if self.digest else ''}{self.digest}"

    @property
    def file_stem(self) -> str:
        """What a file with this image is called, without its ending."""
        last = self.repository.rpartition("/")[2]
        return f"{last}_{self.tag or self.digest.partition(':')[2][:12]}"


def is_tag(text: str) -> bool:
    """Return whether a text may be a tag."""
    return _TAG.fullmatch(text) is not None


def parse(text: str, *, docker: bool = True) -> Reference:
    """Return what a name means; with `docker` a name without a host is one of Docker Hub.

    Raises:
        BadReference: it is none.
    """
    name = text.removeprefix("//")
    shown = f"{'docker' if docker else 'oras'}:{text}" if name != text else text
    rest, at, digest = name.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise BadReference(name=shown, reason=f"{digest[:100]!r} is no digest")
    first, slash, path = rest.partition("/")
    if slash and ("." in first or ":" in first or first in ("localhost",) or not docker):
        host = first
    else:
        if not docker:
            raise BadReference(name=shown, reason="it has no host")
        host, path = DOCKER_HUB, rest
    repository, _, tag = path.partition(":")
    if not _HOST.fullmatch(host):
        raise BadReference(name=shown, reason=f"{host[:100]!r} is no host")
    if host in _DOCKER_NAMES:
        host = DOCKER_HUB
        repository = repository if "/" in repository else f"library/{repository}"
    if not _REPOSITORY.fullmatch(repository) or len(repository) > _REPOSITORY_MOST:
        raise BadReference(name=shown, reason=f"{repository[:100]!r} is no repository")
    if ":" in path and not _TAG.fullmatch(tag):
        raise BadReference(name=shown, reason=f"{tag[:100]!r} is no tag")
    return Reference(
        host=host, repository=repository, tag=tag or ("" if digest else "latest"), digest=digest
    )
