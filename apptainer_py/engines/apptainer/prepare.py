"""`prepare_config`: from request, configuration and host to a plan; nothing is done yet."""

from __future__ import annotations

import os

from apptainer_py.base import build, log
from apptainer_py.base.errors import ApptainerError, LaunchError
from apptainer_py.engines.apptainer import environ, lean, mounts, policy, process
from apptainer_py.engines.apptainer.message import pack
from apptainer_py.image.detect import CannotOpen, open_image
from apptainer_py.model import protocol
from apptainer_py.model.plan import ContainerPlan
from apptainer_py.model.request import RANK_VARIABLES, limits_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from apptainer_py.engines.apptainer.drivers import Drivers
    from apptainer_py.engines.apptainer.environ import Environment
    from apptainer_py.engines.apptainer.fakeroot import Degree
    from apptainer_py.engines.apptainer.fusemount import Fuses
    from apptainer_py.engines.apptainer.instance import Service
    from apptainer_py.engines.apptainer.joined import Existing, UserNetwork
    from apptainer_py.engines.apptainer.joining import Joined
    from apptainer_py.engines.apptainer.layers import Shown
    from apptainer_py.engines.apptainer.limits import Limits
    from apptainer_py.engines.apptainer.network import Networks
    from apptainer_py.engines.apptainer.payload import Message
    from apptainer_py.engines.apptainer.security import Security
    from apptainer_py.host.mpi import Rank
    from apptainer_py.image.detect import OpenImage
    from apptainer_py.model.plan import Mount
    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.contexts import Facts, PrepareContext
    from apptainer_py.runtime.janitor import Janitor
    from apptainer_py.runtime.meeting import Meeting

IMAGE_SERVER = f"{build.LIBEXECDIR}/bin/squashfuse_ll"


# What --build-config takes away: a build brings its own, and writes none of it into an image.
_OF_BUILDS = {
    "bind path": (),
    "config resolv_conf": False,
    "mount devpts": False,
    "mount home": False,
}


class ImageUnusable(LaunchError):
    """The image as the user named it cannot be used."""

    message = "{reason}"

    def advice(self) -> str | None:
        """Return what who found it says."""
        told = self.facts.get("advice")
        return str(told) if told else None


class NotWritable(LaunchError):
    """`--writable` on something that nobody can write."""

    message = "could not set {image} image writable: squashfs is a read-only filesystem"
    hint = "`--writable-tmpfs` lets the container write to memory instead"


class UsernsForbidden(LaunchError):
    """The administrator allows no user namespaces."""

    message = "User namespace required but not allowed by configuration."


class NoFuseInside(LaunchError):
    """Only a squashfs root is mounted outside."""

    message = "this launch needs a FUSE mount in its user namespace, which is not allowed here"
    hint = "the administrator has set `allow userns-mount fuse = no`; sandboxes need no such mount"


class ServerMissing(LaunchError):
    """The program that serves squashfs images is not installed."""

    message = "{path} is not installed"
    hint = "install the package squashfuse and then apptainer-py again (./install)"


class Prepared:
    """What `create_container` needs: all judgement is behind it."""

    __slots__ = (
        "drivers",
        "fakeroot",
        "filter",
        "fuse",
        "fuse_count",
        "fuses",
        "host_root",
        "hostname",
        "image",
        "janitor",
        "joined",
        "label",
        "layer",
        "limits",
        "links",
        "meeting",
        "mounts",
        "networks",
        "offset",
        "overlays",
        "payload",
        "program",
        "rank",
        "read_only_root",
        "root_fd",
        "root_fs",
        "service",
        "session_mib",
        "shim",
        "shown",
        "size_bytes",
        "staged",
        "underlay_allowed",
        "user",
        "what",
        "writable_root",
    )

    def __init__(self, image: OpenImage) -> None:
        self.image = image
        self.fakeroot: Degree | None = None
        self.offset = 0
        self.size_bytes = 0
        self.fuse = False
        self.filter: list[bytes] = []
        self.label: list[bytes] = []
        self.fuse_count = 0
        self.fuses: Fuses | None = None
        # Where the image is mounted on the host, by fusermount3.
        self.host_root = ""
        self.overlays = 0
        self.root_fs = "squashfs"
        self.root_fd = image.fd
        self.shown: list[Shown] = []
        self.layer = protocol.LAYERKIND_OVERLAY
        self.underlay_allowed = True
        self.mounts: list[Mount] = []
        self.staged: list[tuple[str, str, str | bytes, int]] = []
        # Links that the layer shows where the image has nothing: what each holds, and its path.
        self.links: list[tuple[str, str]] = []
        self.hostname = ""
        self.limits: Limits | None = None
        self.janitor: Janitor | None = None
        # Where others of a job meet; and what is there already, if this is not the first.
        self.meeting: Meeting | None = None
        self.joined: Joined | None = None
        # Who tells whether the image's MPI fits; one of the job here.
        self.rank: Rank | None = None
        self.program = ""
        # Of a lean stage 2: what the payload is.
        self.payload: Message | None = None
        self.networks: Existing | Networks | UserNetwork | None = None
        self.shim = False
        self.session_mib = 0
        self.service: Service | None = None
        self.writable_root = False
        self.read_only_root = True
        self.user = mounts.User("", "", "", 0, 0)
        self.what = ""
        self.drivers: Drivers | None = None

    @property
    def inner(self) -> bool:
        """Whether the container has a user namespace in which the caller is root."""
        return self.fakeroot is not None and self.fakeroot.namespace


def prepare(context: PrepareContext) -> Prepared:
    """Judge the request, fill the context's plan, and return what create_container needs.

    Raises:
        ApptainerError: the request, the image or the policy does not allow the launch.
    """
    action = context.action
    assert action is not None
    facts = context.facts
    tell_flow(facts)
    check_flow(facts)
    if action.unsquash:
        text = "launcher and package are of different versions: install both again"
        raise LaunchError(text=text)
    if action.build_config:
        facts.configuration = {**facts.configuration, **_OF_BUILDS}
    policy.check_directives(facts.configuration, action)
    check_options(action, facts)
    networks = None
    if wants_network(action):
        from apptainer_py.engines.apptainer import network

        networks = network.judge(action, context)
    limits = find_limits(action, context)
    security = read_security(action, facts)
    image = open_file(action)
    try:
        policy.check_image(facts, image)
        prepared = Prepared(image)
        prepared.limits = limits
        prepared.networks = networks
        return judge(prepared, action, context, security)
    except policy.NotPermitted:
        context.record_refusal(image.realpath)
        raise


def prepare_join(context: PrepareContext) -> Joined:
    """Judge what shall be started in an instance.

    Raises:
        ApptainerError: it cannot be.
    """
    from apptainer_py.engines.apptainer import joining

    action, facts = context.action, context.facts
    assert action is not None
    check_flow(facts)
    check_options(action, facts)
    flags, caps = choose_privileges(action, facts), choose_capabilities(action, facts)
    return joining.prepare(context, flags, caps)


def judge(
    prepared: Prepared, action: ActionRequest, context: PrepareContext, security: Security | None
) -> Prepared:
    """Choose root, layer, namespaces, mounts and process of an image that may be run."""
    facts = context.facts
    action = choose_drivers(prepared, action, context)
    action = choose_fuses(prepared, action, context)
    degree = choose_fakeroot(prepared, action, facts)
    choose_root(prepared, action, context)
    choose_layer(prepared, action, facts)
    choose_overlays(prepared, action, facts)
    spaces, flags = choose_spaces(prepared, action, facts)
    if degree:
        flags = degree.flags | flags & ~protocol.PLANFLAG_NO_NEW_PRIVS
    prepared.shim = bool(flags & protocol.PLANFLAG_SHIM)
    if prepared.networks is not None:
        flags |= prepared.networks.flags
    prepared.user = mounts.find_user(facts, action, context.environment, as_root=degree is not None)
    if action.instance:
        become_service(prepared, action, context)
    plan = ContainerPlan(
        image=prepared.image.realpath,
        uid=0 if degree else facts.uid,
        gid=0 if degree else facts.gid,
        spaces=spaces,
        flags=flags,
        caps=degree.capabilities(action) if degree else choose_capabilities(action, facts),
    )
    if security is not None:
        if degree and security.changes_identity:
            raise LaunchError(
                text="--security uid and gid cannot be used with --fakeroot: inside one is root"
            )
        from apptainer_py.engines.apptainer.security import apply

        plan = apply(security, plan, prepared, action, facts)
        if prepared.service:
            prepared.service.guards = (prepared.label, prepared.filter)
    fake_devices(prepared, action)
    binds = mounts.plan(prepared, action, context)
    plan = plan.replace(flags=plan.flags | number_devices(prepared, facts))
    environment = environ.collect(action, context.environment)
    add_variables(prepared, environment)
    if prepared.fakeroot and prepared.fakeroot.command:
        from apptainer_py.engines.apptainer.fakeroot import VARIABLES

        environment.forwarded.update(VARIABLES)
    message = process.spec(action, context, prepared, environment, binds)
    plan = plan.replace(fuse_count=prepared.fuse_count)
    plan = share(prepared, action, context, plan, (environment, binds))
    context.plan(choose_stage2(prepared, action, context, plan, message))
    return prepared


def choose_overlays(prepared: Prepared, action: ActionRequest, facts: Facts) -> None:
    """Open the overlays that are asked for, and those that a SIF file has itself."""
    is_sif = prepared.image.kind == "sif"
    if action.overlay or prepared.overlays or (action.writable and is_sif):
        from apptainer_py.engines.apptainer import layers

        if is_sif:
            layers.own_overlays(prepared, action, facts)
        layers.add_overlays(prepared, action, facts)


def become_service(prepared: Prepared, action: ActionRequest, context: PrepareContext) -> None:
    """Take the instance's name, and its files of output in place of the caller's streams."""
    from apptainer_py.engines.apptainer.instance import Service

    parts = prepared.fakeroot.parts if prepared.fakeroot else ()
    prepared.service = Service(
        action, context, prepared.image.realpath, parts, limited=prepared.limits is not None
    )
    context.streams = prepared.service.streams


def choose_stage2(
    prepared: Prepared,
    action: ActionRequest,
    context: PrepareContext,
    plan: ContainerPlan,
    message: Message,
) -> ContainerPlan:
    """Keep what the payload is, for a lean stage 2, or give it to one with an interpreter."""
    if lean.is_fit(prepared, action, context.facts, plan):
        prepared.payload = message
        return plan.replace(flags=plan.flags | protocol.PLANFLAG_LEAN)
    context.tell_start(pack(message))
    return plan


def share(
    prepared: Prepared,
    action: ActionRequest,
    context: PrepareContext,
    plan: ContainerPlan,
    rest: tuple[Environment, str],
) -> ContainerPlan:
    """Return the plan; another one, for a rank of several that live in one container."""
    if not action.sharens and not any(name in context.environment for name in RANK_VARIABLES):
        return plan
    other = (plan.uid, plan.gid) != (context.facts.uid, context.facts.gid)
    if other and not prepared.fakeroot:
        return plan  # the others would not see the same names
    from apptainer_py.engines.apptainer import ranks

    return ranks.arrange(ranks.Launch(prepared, action, context, *rest), plan)


def choose_fakeroot(prepared: Prepared, action: ActionRequest, facts: Facts) -> Degree | None:
    """Return the degree of --fakeroot where it has a namespace of its own."""
    if not action.fakeroot:
        return None
    from apptainer_py.engines.apptainer import fakeroot

    prepared.fakeroot = fakeroot.choose(action, facts, prepared.image.kind)
    return prepared.fakeroot if prepared.fakeroot.namespace else None


def tell_flow(facts: Facts) -> None:
    """Say why the user-namespace flow is taken when nobody asked for it."""
    if facts.flow == protocol.FLOW_USERNS and facts.reason not in (
        protocol.REASON_NONE,
        protocol.REASON_ASKED,
    ):
        why = protocol.REASON_TEXTS.get(facts.reason, "")
        log.info(f"Using the user-namespace flow, because {why}")
    if facts.flow != protocol.FLOW_SETUID:
        for line, key, text, _ in facts.config_problems[:1]:
            log.warning(
                f"{build.CONFIG_FILE}:{line}: {key}: {text}; see `apptainer-py config check`"
            )


def check_flow(facts: Facts) -> None:
    """Refuse what the configuration forbids outright."""
    if facts.flow == protocol.FLOW_USERNS and not facts.configuration["allow user ns"]:
        raise UsernsForbidden


def check_options(action: ActionRequest, facts: Facts) -> None:
    """Refuse options that need more rights than the caller has."""
    if facts.uid == 0:
        return
    for option in ("boot", "keep_privs", "allow_setuid"):
        if getattr(action, option):
            from apptainer_py.engines.apptainer import capabilities

            raise capabilities.RootOnly(option="--" + option.replace("_", "-"))


def read_security(action: ActionRequest, facts: Facts) -> Security | None:
    """Return what --security asks for; None, at no cost, where it is not given."""
    if not action.security:
        return None
    from apptainer_py.engines.apptainer import security

    return security.read(action.security, facts)


def wants_drivers(action: ActionRequest, configuration: Mapping[str, object]) -> bool:
    """Return whether files of the host's drivers are asked for, by an option or a directive."""
    return bool(
        action.containlibs
        or action.device
        or action.intel_hpu
        or action.nv
        or action.nvccli
        or action.rocm
        or (configuration["always use nv"] and not action.no_nv)
        or (configuration["always use rocm"] and not action.no_rocm)
    )


def choose_drivers(
    prepared: Prepared, action: ActionRequest, context: PrepareContext
) -> ActionRequest:
    """Find the drivers that are wanted; return the request with what follows from them."""
    if not wants_drivers(action, context.facts.configuration):
        return action
    from apptainer_py.engines.apptainer import drivers

    action, prepared.drivers = drivers.find(action, context)
    return action


def choose_fuses(
    prepared: Prepared, action: ActionRequest, context: PrepareContext
) -> ActionRequest:
    """Judge --fusemount; return the request with what follows from it."""
    if not action.fusemount:
        return action
    from apptainer_py.engines.apptainer import fusemount

    prepared.fuses = fusemount.choose(action, context.facts, context.environment)
    return action.replace(pid=True) if prepared.fuses.inside else action


def number_devices(prepared: Prepared, facts: Facts) -> int:
    """Give the file systems beside the root their devices; return what the plan says of them."""
    flags = 0
    if prepared.fuses:
        prepared.fuses.plan(prepared)
    if prepared.shown:
        from apptainer_py.engines.apptainer import layers

        flags = layers.plan_flags(prepared)
    if prepared.fuse_count and is_mounted_outside(facts):
        raise NoFuseInside
    return flags


def fake_devices(prepared: Prepared, action: ActionRequest) -> None:
    """Let a build's scripts believe that they made devices, which no user namespace makes."""
    if not (prepared.inner and action.build_config) or prepared.filter:
        return
    from apptainer_py.host import fake_devices

    prepared.filter = [fake_devices.program().hex().encode(), b"0"]


def add_variables(prepared: Prepared, environment: Environment) -> None:
    """Let the payload find the drivers' libraries, and give it their variables."""
    if prepared.drivers:
        from apptainer_py.engines.apptainer import drivers

        environment.forwarded.update(prepared.drivers.environment)
        environment.fixed.update(prepared.drivers.fixed)
        environment.last += drivers.library_path(prepared.drivers)


def find_limits(action: ActionRequest, context: PrepareContext) -> Limits | None:
    """Return what the container is limited to, if any limit is asked for."""
    given = limits_of(action)
    if not given and not action.apply_cgroups:
        return None
    from apptainer_py.engines.apptainer import limits

    return limits.find(action, context.facts, context.environment, given)


def open_file(action: ActionRequest) -> OpenImage:
    """Open the image once; everything later goes through that descriptor."""
    try:
        return open_image(action.image)
    except CannotOpen as error:
        reason = f"While checking container encryption: {error}"
        raise ImageUnusable(reason=reason, advice=error.advice()) from None


def choose_root(prepared: Prepared, action: ActionRequest, context: PrepareContext) -> None:
    """Find the root file system, and who may mount it: the kernel, or an image server."""
    if action.pem_path or "APPTAINER_ENCRYPTION_PEM_PATH" in context.environment:
        from apptainer_py.engines.apptainer import encrypted

        encrypted.check_named(action, context.environment)
    image, facts = prepared.image, context.facts
    prepared.what = f"cannot mount {image.path}"
    prepared.size_bytes = image.size_bytes
    prepared.offset = image.offset
    if image.kind == "sandbox":
        prepared.writable_root = action.writable
        prepared.read_only_root = not action.writable
        return
    if image.kind == "sif":
        choose_partition(prepared, action, context)
    elif image.kind == "ext3":
        prepared.root_fs = "ext3"
        prepared.size_bytes -= image.offset
    if prepared.root_fs == "ext3":
        choose_extfs(prepared, action, facts)
        return
    if action.writable and image.kind != "sif":
        raise NotWritable(image=image.path)
    # The kernel mounts nothing by a device in a namespace of the user's, and no nameless memory.
    decrypted = prepared.root_fd != image.fd
    prepared.fuse = prepared.inner or decrypted or not policy.kernel_may_mount(facts)
    if prepared.fuse and not os.path.exists(IMAGE_SERVER):
        raise ServerMissing(path=IMAGE_SERVER)
    if prepared.fuse and is_mounted_outside(facts):
        from apptainer_py.engines.apptainer import host_image

        host_image.plan(prepared, context)
        return
    prepared.fuse_count = 1 if prepared.fuse else 0


def is_mounted_outside(facts: Facts) -> bool:
    """Return whether the administrator has FUSE mounts made outside of the user namespace."""
    if facts.configuration["allow userns-mount fuse"]:
        return False
    return facts.flow == protocol.FLOW_USERNS


def choose_extfs(prepared: Prepared, action: ActionRequest, facts: Facts) -> None:
    """Lock an ext3 root, for `-w` to write it, and find who may mount it."""
    from apptainer_py.engines.apptainer import extfs

    image = prepared.image
    place = (prepared.offset, prepared.size_bytes)
    writable = action.writable and image.kind == "ext3"
    prepared.root_fd, prepared.writable_root = extfs.prepare(image, place, facts, writable=writable)
    if writable and not prepared.writable_root:
        raise extfs.not_writable(image)
    prepared.read_only_root = not prepared.writable_root
    prepared.fuse = prepared.inner or not extfs.kernel_may_mount(facts)
    # Device 0 is the forecast's, which knows squashfs alone; another plan begins anew.
    prepared.fuse_count = extfs.ROOT_DEVICE + 1 if prepared.fuse else 0


def choose_partition(prepared: Prepared, action: ActionRequest, context: PrepareContext) -> None:
    """Take the primary system partition of a SIF file."""
    from apptainer_py.image.sif import NoRootFileSystem, SifError, layout

    image = prepared.image
    try:
        found = layout(image.fd)
        partition = found.primary
    except (SifError, NoRootFileSystem) as error:
        reason = f"While checking container encryption: {error}"
        raise ImageUnusable(reason=reason, advice=error.advice()) from None
    prepared.root_fs = partition.fs
    prepared.overlays = len(found.overlays)
    prepared.offset = partition.offset
    prepared.size_bytes = partition.size_bytes
    if partition.fs in policy.ENCRYPTED:
        from apptainer_py.engines.apptainer import encrypted

        encrypted.open_root(prepared, partition, action, context)
        return
    if partition.fs not in ("squashfs", "ext3"):
        raise ImageUnusable(
            reason=f"{image.path}: a root file system of type {partition.fs} is not supported yet"
        )


def choose_layer(prepared: Prepared, action: ActionRequest, facts: Facts) -> None:
    """Choose what lies over the image (facts §6.2)."""
    configuration = facts.configuration
    overlay, underlay = configuration["enable overlay"], configuration["enable underlay"]
    prepared.underlay_allowed = underlay != "no"
    if action.writable_tmpfs and action.writable:
        log.warning("Disabling --writable-tmpfs flag, mutually exclusive with --writable")
    if action.writable_tmpfs and not action.writable:
        if overlay == "no":
            raise policy.NotPermitted(
                text="--writable-tmpfs requires 'enable overlay', but set to 'no' by administrator"
            )
        prepared.layer = protocol.LAYERKIND_OVERLAY_TMPFS
    elif action.writable:
        prepared.layer = protocol.LAYERKIND_NONE
    elif action.underlay or underlay == "preferred":
        if underlay == "no":
            raise policy.NotPermitted(
                text="--underlay requires 'enable underlay', but set to 'no' by administrator"
            )
        prepared.layer = protocol.LAYERKIND_UNDERLAY
    elif overlay != "no":
        prepared.layer = protocol.LAYERKIND_OVERLAY
    elif underlay != "no":
        prepared.layer = protocol.LAYERKIND_UNDERLAY
    else:
        prepared.layer = protocol.LAYERKIND_NONE
    size = configuration["sessiondir max size"]
    unlimited = facts.flow == protocol.FLOW_ROOT
    prepared.session_mib = size if isinstance(size, int) and not unlimited else 0


def choose_spaces(prepared: Prepared, action: ActionRequest, facts: Facts) -> tuple[int, int]:
    """Return namespaces and flags of the plan; what the administrator forbids is left out."""
    spaces = 0
    for wanted, bit, name in (
        (action.pid, protocol.SPACE_PID, "pid"),
        (action.ipc, protocol.SPACE_IPC, "ipc"),
        (action.uts or bool(action.hostname), protocol.SPACE_UTS, "uts"),
        (wants_network(action), protocol.SPACE_NET, ""),
    ):
        if not wanted:
            continue
        if name and not facts.configuration[f"allow {name} ns"]:
            log.warning(f"Not virtualizing {name} namespace by configuration")
            continue
        spaces |= bit
    flags = first_process(action, spaces)
    if prepared.layer == protocol.LAYERKIND_OVERLAY_TMPFS:
        flags |= protocol.PLANFLAG_WRITABLE_LAYER
    if prepared.image.kind != "sandbox" and not prepared.fuse and not prepared.host_root:
        extfs = prepared.root_fs == "ext3"
        flags |= protocol.PLANFLAG_KERNEL_EXTFS if extfs else protocol.PLANFLAG_KERNEL_IMAGE
    if facts.configuration["mount slave"]:
        flags |= protocol.PLANFLAG_SLAVE
    flags |= choose_privileges(action, facts)
    if action.hostname and spaces & protocol.SPACE_UTS:
        prepared.hostname = check_hostname(action.hostname)
    return spaces, flags


def first_process(action: ActionRequest, spaces: int) -> int:
    """Return what the plan says of process 1: an instance lives as long as ours."""
    if action.instance:
        shim = 0 if action.boot else protocol.PLANFLAG_SHIM
        return shim | protocol.PLANFLAG_INSTANCE
    shim = spaces & protocol.SPACE_PID and not action.no_init
    return protocol.PLANFLAG_SHIM if shim else 0


def wants_network(action: ActionRequest) -> bool:
    """Return whether the container is to have a network of its own."""
    return any((action.net, action.network, action.network_args, action.netns_path))


def check_hostname(name: str) -> str:
    """Return a host name that is fit to be one (RFC 1123: letters, digits, '-' and '.').

    Raises:
        LaunchError: it is not.
    """
    parts = name.split(".")
    fit = all(
        part
        and part.isascii()
        and part.replace("-", "a").isalnum()
        and part[0] != "-"
        and part[-1] != "-"
        for part in parts
    )
    if not fit or len(name) >= protocol.LIMIT_HOSTNAME_BYTES:
        raise LaunchError(
            text=f"container creation failed: unable to add {name} to hostname file: {name} is not "
            "a valid hostname"
        )
    return name


def choose_capabilities(action: ActionRequest, facts: Facts) -> tuple[int, int, int, int, int]:
    """Return the payload's five capability sets."""
    if facts.uid != 0 and not action.add_caps and not action.drop_caps:
        return (0, 0, 0, 0, 0)
    from apptainer_py.engines.apptainer import capabilities

    userns = facts.flow == protocol.FLOW_USERNS
    if facts.uid == 0:
        return capabilities.for_root(
            action.asdict(),
            str(facts.configuration["root default capabilities"]),
            capabilities.of_a_namespace() if userns else facts.permitted,
        )
    return capabilities.for_user(
        action.add_caps, action.drop_caps, facts.uid, facts.permitted, userns=userns
    )


def _default_of_root(action: ActionRequest, default: str) -> str:
    from apptainer_py.engines.apptainer import capabilities

    return capabilities.default_of_root(action.asdict(), default)


def choose_privileges(action: ActionRequest, facts: Facts) -> int:
    """Return the plan's flags about what the payload may gain: something for root alone."""
    default = str(facts.configuration["root default capabilities"])
    flags = 0
    if facts.uid != 0 or _default_of_root(action, default) == "no":
        flags |= protocol.PLANFLAG_NO_NEW_PRIVS
    # In a namespace of its own root may not lift what the host's mounts have.
    if action.allow_setuid and facts.flow == protocol.FLOW_ROOT:
        flags |= protocol.PLANFLAG_SETUID
    return flags


__all__ = ["ApptainerError", "Prepared", "prepare"]
