"""`cache list|clean`: what lies in the cache of fetched images, and how to be rid of it."""

from __future__ import annotations

import json
import time

from apptainer_py.base.errors import ApptainerError
from apptainer_py.cache.store import BLOB, FILES, KINDS, Cache, folder_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from apptainer_py.cache.store import Entry

_NAME_WIDTH = 22
_DAY_S = 86400
_LEFTOVERS_S = 3600.0
_QUESTION = "This will delete everything in your cache (containers from all sources and OCI blobs)."


class WrongKind(ApptainerError):
    """There are no entries of such a kind."""

    message = "{word} is no kind of cache entry; the kinds are: {kinds}, all"


def cache_list(
    environ: Mapping[str, str], kinds: Sequence[str], *, verbose: bool, as_json: bool
) -> str:
    """Return a table of the entries, or the sums alone.

    Raises:
        WrongKind: there are no such entries.
    """
    cache = Cache(folder_of(environ))
    found = list(cache.entries(_kinds(kinds)))
    if as_json:
        rows = [
            {
                "name": one.name,
                "type": one.kind,
                "size": one.size_bytes,
                "created": int(one.made_s),
                "source": one.source,
                "path": one.path,
            }
            for one in found
        ]
        return json.dumps({"folder": cache.folder, "entries": rows}, indent=4) + "\n"
    return (_table(found) if verbose else "") + _sums(found)


def _kinds(words: Sequence[str]) -> tuple[str, ...]:
    chosen = [word for entry in words for word in entry.split(",") if word] or ["all"]
    for word in chosen:
        if word not in (*KINDS, "all"):
            raise WrongKind(word=word, kinds=", ".join(KINDS))
    if "all" in chosen:
        return tuple(sorted(KINDS))
    return tuple(kind for kind in KINDS if kind in chosen)


def _table(found: Sequence[Entry]) -> str:
    lines = [f"{'NAME':<25}{'DATE CREATED':<23}{'SIZE':<17}{'TYPE':<10}{'SOURCE'}"]
    for one in found:
        made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.made_s))
        size = _size(one.size_bytes)
        name = one.name[:_NAME_WIDTH]
        line = f"{name:<25}{made:<23}{size:<17}{one.kind:<10}{one.source}"
        lines.append(line.rstrip())
    return "\n".join(lines) + "\n\n"


def _sums(found: Sequence[Entry]) -> str:
    files = [one.size_bytes for one in found if one.kind != BLOB]
    blobs = [one.size_bytes for one in found if one.kind == BLOB]
    return (
        f"There are {len(files)} container file(s) using {_size(sum(files))} and {len(blobs)} oci "
        f"blob file(s) using {_size(sum(blobs))} of space\n"
        f"Total space used: {_size(sum(files) + sum(blobs))}\n"
    )


def _size(number: int) -> str:
    for exponent, unit in ((3, "GiB"), (2, "MiB")):
        if number >= 1024**exponent:
            return f"{number / 1024**exponent:.2f} {unit}"
    return f"{number / 1024:.2f} KiB"


def cache_clean(
    environ: Mapping[str, str],
    kinds: Sequence[str],
    *,
    days: int,
    dry_run: bool,
    sure: Callable[[str], bool],
) -> Iterator[str]:
    """Remove entries; yield a line about each.

    Raises:
        WrongKind: there are no such entries.
        CacheError: one cannot be removed.
    """
    cache = Cache(folder_of(environ))
    wanted = _kinds(kinds)
    if not dry_run and not sure(_QUESTION):
        yield "Cache cleanup canceled"
        return
    if dry_run:
        yield "User requested a dry run. Not actually deleting any data!"
    for kind in wanted:
        gone = 0
        for one in cache.entries((kind,)):
            if days > 0 and time.time() - one.made_s < days * _DAY_S:
                continue
            gone += 1
            yield f"Removing {kind} cache entry: {one.name}"
            if not dry_run:
                cache.remove(one)
        if not gone:
            where = cache.blobs if kind == BLOB else f"{cache.folder}/{kind}"
            yield f"No cached files to remove at {where}"
    if not dry_run and set(wanted) >= set(FILES):
        cache.sweep(_LEFTOVERS_S)
