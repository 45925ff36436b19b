"""Bootstrap agents for what lies elsewhere: images of registries, and files of the web."""

from __future__ import annotations

from apptainer_py.base import log
from apptainer_py.base.errors import ApptainerError
from apptainer_py.builds import agents, report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from apptainer_py.builds.agents import Agent, Base, Order
    from apptainer_py.builds.fetching import Fetching
    from apptainer_py.builds.remote import Arriving, Named
    from apptainer_py.cache.store import Cache


def register(how: Fetching, cache: Cache | None = None) -> None:
    """Add the agents, which keep what they fetch in the caller's cache, or in another."""
    agents.register("docker", _docker(how, cache))
    agents.register("docker-daemon", _daemon(how))
    for transport in ("oras", "http", "https"):
        agents.register(transport, _file(transport, how))
    agents.register("library", _library(how))


def _cache_for(how: Fetching, order: Order) -> AbstractContextManager[Cache]:
    """Give the caller's cache; one for this time only goes with the build's own directory."""
    from apptainer_py.builds import uris

    return uris.cache_for(how.replace(tmpdir=order.folder), order.environ)


def _file(transport: str, how: Fetching) -> Agent:
    def fill(order: Order) -> Base:
        from apptainer_py.builds import uris

        with _cache_for(how, order) as cache:
            uri = f"{transport}://{order.source}"
            path = uris.fetch(uri, how, order.environ, cache, uris.no_layers)
            return agents.local_image(order.replace(header={**order.header, "from": path}))

    return fill


def _library(how: Fetching) -> Agent:
    def fill(order: Order) -> Base:
        from apptainer_py.builds import libraries
        from apptainer_py.registry import library

        name = library.parse(order.source.removeprefix("library:"))
        chosen = how.replace(library=order.header.get("library", "") or how.library)
        with _cache_for(how, order) as cache:
            path = libraries.fetch(name, chosen, order.environ, cache)
            return agents.local_image(order.replace(header={**order.header, "from": path}))

    return fill


def _docker(how: Fetching, cache: Cache | None) -> Agent:
    def fill(order: Order) -> Base:
        if cache is not None:
            return unpack(order, cache)
        with _cache_for(how, order) as own:
            return unpack(order, own)

    def unpack(order: Order, cache: Cache) -> Base:
        from apptainer_py.builds import remote
        from apptainer_py.registry import reference

        header = order.header
        parts = [header.get("registry", ""), header.get("namespace", ""), order.source]
        name = "/".join(part.strip("/") for part in parts if part)
        named = reference.parse(name)
        log.info("Fetching OCI image...")
        try:
            with remote.found(named, how, order.environ) as (registry, found):
                total = sum(layer.size_bytes for layer in found.layers)
                with report.counting("Fetching layers", total) as told:
                    with remote.Arriving(registry, found, cache, told) as arriving:
                        base = stream(order, found, cache, arriving)
                        arriving.wait()
        except ApptainerError as error:
            raise agents.ConveyorFailed(reason=str(error)) from None
        if base is not None:
            return base
        layout = remote.layout_of(found, cache, any_machine=bool(how.arch))
        return agents.unpack_layout(layout, order.replace(plan=None))

    def stream(order: Order, found: Named, cache: Cache, arriving: Arriving) -> Base | None:
        from apptainer_py.builds import remote

        if order.plan is None:
            return None
        arriving.wait_for(found.config)
        layout = remote.layout_of(found, cache, any_machine=bool(how.arch))
        try:
            return agents.stream_layout(layout, order, arriving.open)
        finally:
            layout.close()

    return fill


def _daemon(how: Fetching) -> Agent:
    def fill(order: Order) -> Base:
        import hashlib
        import os

        from apptainer_py.base.errors import ImageError
        from apptainer_py.registry import daemon

        path = f"{order.folder}/docker.tar"
        log.info("Fetching OCI image...")
        try:
            server = daemon.Daemon(daemon.address_of(how.docker_host, order.environ), order.environ)
            # By its digest: the tag may be another image's by now.
            name = server.identity(order.source)
            with report.counting("Fetching the image", 0) as told:
                server.save(name, path, told)
            layout = agents.open_layout("docker-archive", path, order.folder)
            if f"sha256:{hashlib.sha256(layout.image().config).hexdigest()}" != name:
                raise agents.ConveyorFailed(reason=f"{server.address} gave another image")
        except ImageError as error:
            raise agents.ConveyorFailed(reason=str(error)) from None
        except daemon.DaemonError as error:
            raise agents.ConveyorFailed(reason=str(error), advice=error.advice()) from None
        base = agents.unpack_layout(layout, order.replace(plan=None))
        os.unlink(path)
        return base

    return fill
