"""What an image says about how to start it (OCI image configuration, `config`)."""

from __future__ import annotations

from apptainer_py.base.errors import ImageError
from apptainer_py.base.record import Record
from apptainer_py.model.json_text import JsonWrong, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CONFIG_BYTES = 4 << 20
# As Docker gives a container whose image names none.
DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_WORDS_MOST = 65536


class ImageConfig(Record):
    """Entry point and command as argument lists; `user` is "", or name or number[:group]."""

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    user: str = ""
    directory: str = ""
    volumes: tuple[str, ...] = ()


def parse_config(data: bytes, *, image: str) -> ImageConfig:
    """Return the configuration: of a whole image file, or its `config` alone, as SIF files have it.

    Raises:
        ImageError: it is no JSON, or a value is of the wrong type.
    """
    try:
        value = loads(data)
    except JsonWrong as error:
        raise ImageError(image=image, reason=f"its OCI configuration: {error}") from None
    if isinstance(value, dict) and "rootfs" in value and "config" in value:
        value = value["config"] or {}
    if not isinstance(value, dict):
        raise ImageError(image=image, reason="its OCI configuration is no JSON object")
    reader = _Reader(value, image)
    environment = reader.words("Env")
    return ImageConfig(
        entrypoint=reader.words("Entrypoint"),
        command=reader.words("Cmd"),
        environment=tuple(entry for entry in environment if entry.find("=") > 0),
        user=reader.text("User"),
        directory=reader.text("WorkingDir"),
        volumes=reader.keys("Volumes"),
    )


class _Reader:
    def __init__(self, value: dict[str, Any], image: str) -> None:
        self._value = value
        self._image = image

    def _wrong(self, key: str) -> ImageError:
        return ImageError(image=self._image, reason=f"its OCI configuration has a wrong {key}")

    def text(self, key: str) -> str:
        found = self._value.get(key)
        if found is None:
            return ""
        if not isinstance(found, str) or "\0" in found:
            raise self._wrong(key)
        return found

    def words(self, key: str) -> tuple[str, ...]:
        found = self._value.get(key)
        if found is None:
            return ()
        if not isinstance(found, list) or len(found) > _WORDS_MOST:
            raise self._wrong(key)
        if not all(isinstance(word, str) and "\0" not in word for word in found):
            raise self._wrong(key)
        return tuple(found)

    def keys(self, key: str) -> tuple[str, ...]:
        found = self._value.get(key)
        if found is None:
            return ()
        if not isinstance(found, dict) or any("\0" in name for name in found):
            raise self._wrong(key)
        return tuple(found)
