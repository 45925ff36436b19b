"""Every command and option, as data: the parser, the launcher, help and completion read it.

Plain tuples, because this module is loaded on every launch. The names, kinds and environment
keys are Apptainer's; the options that only this program has are `--trace` and `config check|show`.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    Option = tuple[
        str,  # long name
        str,  # letter or ""
        str,  # kind
        object,  # default
        tuple[str, ...],  # environment keys, without their prefix
        tuple[str, ...],  # commands
        str,  # status
        str,  # help
    ]
    Command = tuple[str, str, int, int, str, str]

PROGRAM: Final = "apptainer-py"

# Kinds, named as the usage text shows them.
BOOL: Final = "bool"
STRING: Final = "string"
LIST: Final = "strings"
REPEAT: Final = "stringArray"
INT: Final = "int"
MAP: Final = "stringToString"

SUPPORTED: Final = "supported"
REFUSED: Final = "not supported yet"
# Supported where the `oci` engine starts the image; the other has nothing of the kind.
OCI_ONLY: Final = "with --oci"
# Matters only while an image is fetched; a local image has nothing that it could change.
FETCHING: Final = "fetching"

ROOT: Final = ("",)
ACTIONS: Final = ("exec", "run", "shell", "test")
INSTANCES: Final = ("instance start", "instance run")
_ALL: Final = ACTIONS + INSTANCES
_SIF: Final = ("sif list", "sif header", "sif info", "sif dump")

_OCI_MAKE: Final = ("oci create", "oci run")
_OCI_ONE: Final = ("oci kill",)
_GRANTING: Final = ("capability add", "capability drop")

PREFIXES: Final = ("APPTAINER_", "SINGULARITY_")

# Sorted by long name: environment variables are looked at in this order.
OPTIONS: Final[tuple[Option, ...]] = (
    ("add", "a", BOOL, False, (), ("config fakeroot",), SUPPORTED,
     "give a user a range of subordinate ids"),
    ("add-caps", "", STRING, "", ("ADD_CAPS",), _ALL, SUPPORTED,
     "capabilities to add, separated by commas"),
    ("all", "", BOOL, False, (), ("inspect",), SUPPORTED,
     "show everything there is, as JSON"),
    ("all", "a", BOOL, False, ("ALL",), ("instance list",), SUPPORTED,
     "list instances too that only share namespaces"),
    ("all", "a", BOOL, False, ("ALL",), ("instance stop",), SUPPORTED,
     "stop all instances of the user"),
    ("allow-setuid", "", BOOL, False, ("ALLOW_SETUID",), _ALL, SUPPORTED,
     "let setuid programs of the container work (root only)"),
    ("app", "", STRING, "", ("APP", "APPNAME"), _ALL, SUPPORTED,
     "name of the SCIF application to run"),
    ("app", "", STRING, "", (), ("inspect", "run-help"), SUPPORTED,
     "look at this SCIF application only"),
    ("apply-cgroups", "", STRING, "", ("APPLY_CGROUPS",), _ALL, SUPPORTED,
     "TOML file with the limits of the container (root, or with systemd and cgroup v2)"),
    ("authfile", "", STRING, "", ("AUTH_FILE",), _ALL, FETCHING,
     "file with the credentials for OCI registries"),
    ("bind", "B", REPEAT, (), ("BIND", "BINDPATH"), _ALL, SUPPORTED,
     "make a path of the host visible: source[:target[:options]], several separated by commas; "
     "the target is the source if it is not given, options are ro and rw"),
    ("blkio-weight", "", INT, 0, ("BLKIO_WEIGHT",), _ALL, SUPPORTED,
     "relative weight of block input and output, 10 to 1000, 0 for none"),
    ("blkio-weight-device", "", LIST, (), ("BLKIO_WEIGHT_DEVICE",), _ALL, SUPPORTED,
     "the same for one device, path:weight"),
    ("boot", "", BOOL, False, ("BOOT",), INSTANCES, REFUSED,
     "start the container's own init (root only)"),
    ("build-config", "", BOOL, False, (), ROOT, SUPPORTED,
     "launch as a build does: without the host's bind paths, home, devpts and resolv.conf"),
    ("bundle", "b", STRING, "", ("BUNDLE",), _OCI_MAKE, SUPPORTED,
     "directory of the bundle (required)"),
    ("cdi-dirs", "", LIST, (), (), ACTIONS, SUPPORTED,
     "directories with the CDI specifications of devices, in place of /etc/cdi and /var/run/cdi"),
    ("cleanenv", "e", BOOL, False, ("CLEANENV",), _ALL, SUPPORTED,
     "do not pass the environment of the host"),
    ("compat", "", BOOL, False, ("COMPAT",), _ALL, SUPPORTED,
     "behave more like OCI runtimes: --containall, --no-init, --no-umask, --no-eval and "
     "--writable-tmpfs together"),
    ("compat32", "", BOOL, False, ("COMPAT32",), _ALL, SUPPORTED,
     "bring the 32-bit libraries of the drivers too, in /.singularity.d/libs32"),
    ("config", "c", STRING, "", ("CONFIG_FILE",), ROOT, SUPPORTED,
     "use this configuration file (for root, or where no setuid starter is installed)"),
    ("console-socket", "", STRING, "", (), _OCI_MAKE, SUPPORTED,
     "socket that is given the terminal"),
    ("contain", "c", BOOL, False, ("CONTAIN",), _ALL, SUPPORTED,
     "a minimal /dev and empty directories in place of the host's, such as /tmp and $HOME"),
    ("containall", "C", BOOL, False, ("CONTAINALL",), _ALL, SUPPORTED,
     "contain processes, IPC and environment too, not only file systems"),
    ("containlibs", "", LIST, (), ("CONTAINLIBS",), _ALL, SUPPORTED,
     "libraries to make visible in /.singularity.d/libs"),
    ("cpu-shares", "", INT, -1, ("CPU_SHARES",), _ALL, SUPPORTED,
     "relative share of processor time"),
    ("cpus", "", STRING, "", ("CPUS",), _ALL, SUPPORTED,
     "number of processors the container may use"),
    ("cpuset-cpus", "", STRING, "", ("CPUSET_CPUS",), _ALL, SUPPORTED,
     "list of processors the container may use"),
    ("cpuset-mems", "", STRING, "", ("CPUSET_MEMS",), _ALL, SUPPORTED,
     "list of memory nodes the container may use"),
    ("cwd", "", STRING, "", ("CWD", "TARGET_CWD"), ACTIONS, SUPPORTED,
     "working directory inside the container"),
    ("debug", "d", BOOL, False, ("DEBUG",), ROOT, SUPPORTED,
     "print all messages there are"),
    ("deffile", "d", BOOL, False, (), ("inspect",), SUPPORTED,
     "show the definition file the image was built from"),
    ("detach", "d", BOOL, False, (), ("oci run",), SUPPORTED,
     "return when the container runs; it is not deleted in the end"),
    ("device", "", LIST, (), (), ACTIONS, SUPPORTED,
     "devices by their CDI names, such as nvidia.com/gpu=0"),
    ("disable", "d", BOOL, False, (), ("config fakeroot",), SUPPORTED,
     "switch a user's ranges off; they stay the user's"),
    ("disable-cache", "", BOOL, False, ("DISABLE_CACHE",), _ALL, FETCHING,
     "neither use nor fill the cache of fetched images"),
    ("dmtcp-launch", "", STRING, "", ("DMTCP_LAUNCH",), INSTANCES, REFUSED,
     "checkpoint to start under"),
    ("dmtcp-restart", "", STRING, "", ("DMTCP_RESTART",), INSTANCES, REFUSED,
     "checkpoint to start from"),
    ("dns", "", STRING, "", ("DNS",), _ALL, SUPPORTED,
     "name servers for resolv.conf, separated by commas"),
    ("docker-host", "", STRING, "", ("DOCKER_HOST",), _ALL, FETCHING,
     "address of the Docker daemon"),
    ("docker-login", "", BOOL, False, ("DOCKER_LOGIN",), _ALL, FETCHING,
     "ask for the account of a Docker registry"),
    ("docker-password", "", STRING, "", ("DOCKER_PASSWORD",), _ALL, FETCHING,
     "password for a Docker registry"),
    ("docker-username", "", STRING, "", ("DOCKER_USERNAME",), _ALL, FETCHING,
     "account name for a Docker registry"),
    ("drop-caps", "", STRING, "", ("DROP_CAPS",), _ALL, SUPPORTED,
     "capabilities to drop, separated by commas"),
    ("dry-run", "d", BOOL, False, (), ("config global",), SUPPORTED,
     "print the resulting configuration in place of writing it"),
    ("effective", "", BOOL, False, (), ("config show",), SUPPORTED,
     "show what applies, and where each value came from"),
    ("empty-process", "", BOOL, False, ("EMPTY_PROCESS",), ("oci create",), SUPPORTED,
     "run no program, for a container that others are executed in"),
    ("enable", "e", BOOL, False, (), ("config fakeroot",), SUPPORTED,
     "switch a user's ranges on again"),
    ("env", "", MAP, (), (), _ALL, SUPPORTED,
     "set variables in the container, NAME=VALUE, several separated by commas"),
    ("env-file", "", LIST, (), ("ENV_FILE",), _ALL, SUPPORTED,
     "files with variables to set in the container"),
    ("environment", "e", BOOL, False, (), ("inspect",), SUPPORTED,
     "show the environment that the image sets"),
    ("fakeroot", "f", BOOL, False, ("FAKEROOT",), _ALL, SUPPORTED,
     "appear as root inside the container"),
    ("force", "f", BOOL, False, (), ("oci delete",), SUPPORTED,
     "kill the container first if it runs"),
    ("force", "f", BOOL, False, ("FORCE",), _OCI_ONE, SUPPORTED,
     "send SIGKILL"),
    ("force", "F", BOOL, False, ("FORCE",), ("instance stop",), SUPPORTED,
     "kill the instance at once"),
    ("fusemount", "", LIST, (), ("FUSESPEC",), _ALL, SUPPORTED,
     "mount a FUSE file system, \"TYPE:PROGRAM [ARGUMENT...] MOUNTPOINT\"; TYPE says where the "
     "program runs, host or container, or host-daemon or container-daemon for one that leaves the "
     "foreground"),
    ("get", "g", BOOL, False, (), ("config global",), SUPPORTED,
     "print the value of a directive"),
    ("group", "g", STRING, "", ("CAP_GROUP",), _GRANTING, SUPPORTED,
     "group whose capabilities change"),
    ("helpfile", "H", BOOL, False, (), ("inspect",), SUPPORTED,
     "show the help text of the image"),
    ("home", "H", STRING, "", ("HOME",), _ALL, SUPPORTED,
     "home directory: source, or source:target where the container shall see it elsewhere"),
    ("hostname", "", STRING, "", ("HOSTNAME",), _ALL, SUPPORTED,
     "host name inside the container"),
    ("ignore-fakeroot-command", "", BOOL, False, ("IGNORE_FAKEROOT_COMMAND",), _ALL, SUPPORTED,
     "act as if there were no fakeroot command"),
    ("ignore-subuid", "", BOOL, False, ("IGNORE_SUBUID",), _ALL, SUPPORTED,
     "act as if /etc/subuid were empty"),
    ("ignore-userns", "", BOOL, False, ("IGNORE_USERNS",), _ALL, SUPPORTED,
     "act as if there were no user namespaces"),
    ("intel-hpu", "", BOOL, False, ("INTEL_HPU",), _ALL, SUPPORTED,
     "Intel Gaudi support: the devices that HABANA_VISIBLE_DEVICES names, all without it"),
    ("ipc", "i", BOOL, False, ("IPC", "UNSHARE_IPC"), _ALL, SUPPORTED,
     "a new IPC namespace"),
    ("json", "j", BOOL, False, (),
     ("inspect", "sif list", "capability avail", "capability list", "config check",
      "config show"), SUPPORTED,
     "print JSON in place of text"),
    ("json", "j", BOOL, False, ("JSON",), ("instance list", "instance stats"), SUPPORTED,
     "print JSON in place of text"),
    ("keep-privs", "", BOOL, False, ("KEEP_PRIVS",), _ALL, SUPPORTED,
     "let root keep its capabilities in the container (root only)"),
    ("labels", "l", BOOL, False, (), ("inspect",), SUPPORTED,
     "show the labels of the image (shown if nothing else is asked for)"),
    ("list-apps", "", BOOL, False, (), ("inspect",), SUPPORTED,
     "list the SCIF applications of the image"),
    ("log-format", "", STRING, "kubernetes", ("LOG_FORMAT",), _OCI_MAKE, SUPPORTED,
     "format of the log: basic, kubernetes or json"),
    ("log-path", "l", STRING, "", ("LOG_PATH",), _OCI_MAKE, SUPPORTED,
     "file of the log"),
    ("logs", "l", BOOL, False, ("LOGS",), ("instance list",), SUPPORTED,
     "show the files with the output of the instances"),
    ("memory", "", STRING, "", ("MEMORY",), _ALL, SUPPORTED,
     "memory limit in bytes"),
    ("memory-reservation", "", STRING, "", ("MEMORY_RESERVATION",), _ALL, SUPPORTED,
     "soft memory limit in bytes"),
    ("memory-swap", "", STRING, "", ("MEMORY_SWAP",), _ALL, SUPPORTED,
     "limit of memory and swap, -1 for none"),
    ("mount", "", REPEAT, (), ("MOUNT",), _ALL, SUPPORTED,
     "a mount as key=value pairs, such as type=bind,source=/data,destination=/mnt"),
    ("net", "n", BOOL, False, ("NET", "UNSHARE_NET"), _ALL, SUPPORTED,
     "a new network namespace"),
    ("netns-path", "", STRING, "", ("NETNS_PATH",), _ALL, SUPPORTED,
     "join the network namespace at this path"),
    ("network", "", STRING, "", ("NETWORK",), _ALL, SUPPORTED,
     "networks to join, separated by commas: none, user (no privilege needed), or for root those "
     "of the configuration"),
    ("network-args", "", LIST, (), ("NETWORK_ARGS",), _ALL, SUPPORTED,
     "arguments for the CNI plug-ins"),
    ("no-descriptions", "", BOOL, False, (),
     ("completion bash", "completion fish", "completion zsh"), SUPPORTED,
     "complete names only, without explanations"),
    ("no-env", "", LIST, (), ("NOENV",), _ALL, SUPPORTED,
     "variables of the host that do not reach the container"),
    ("no-eval", "", BOOL, False, ("NO_EVAL",), _ALL, SUPPORTED,
     "do not let a shell expand variables, nor the OCI command and its arguments"),
    ("no-home", "", BOOL, False, ("NO_HOME",), _ALL, SUPPORTED,
     "do not mount the home directory, unless it is the working directory"),
    ("no-https", "", BOOL, False, ("NOHTTPS", "NO_HTTPS"), _ALL, FETCHING,
     "fetch over http"),
    ("no-init", "", BOOL, False, ("NOSHIMINIT",), _ALL, SUPPORTED,
     "with --pid, make the command itself process 1"),
    ("no-mount", "", LIST, (), ("NO_MOUNT",), _ALL, SUPPORTED,
     "mounts of the configuration to leave out: proc, sys, dev, devpts, home, tmp, hostfs, cwd, "
     "bind-paths, or the target of a bind path"),
    ("no-new-keyring", "", BOOL, False, (), _OCI_MAKE, SUPPORTED,
     "keep the session keyring of the caller"),
    ("no-nv", "", BOOL, False, ("NV_OFF", "NO_NV"), _ALL, SUPPORTED,
     "no NVIDIA support, even if the configuration asks for it"),
    ("no-pid", "", BOOL, False, ("NO_PID",), _ALL, SUPPORTED,
     "no new PID namespace, even if another option implies one"),
    ("no-pivot", "", BOOL, False, (), _OCI_MAKE, SUPPORTED,
     "change the root without pivot_root"),
    ("no-privs", "", BOOL, False, ("NO_PRIVS",), _ALL, SUPPORTED,
     "let root drop all capabilities in the container"),
    ("no-rocm", "", BOOL, False, ("ROCM_OFF", "NO_ROCM"), _ALL, SUPPORTED,
     "no ROCm support, even if the configuration asks for it"),
    ("no-stream", "", BOOL, False, (), ("instance stats",), SUPPORTED,
     "print the numbers once"),
    ("no-umask", "", BOOL, False, ("NO_UMASK",), _ALL, SUPPORTED,
     "start with umask 0022 in place of the caller's"),
    ("nocolor", "", BOOL, False, ("NOCOLOR",), ROOT, SUPPORTED,
     "print without colour"),
    ("nohttps", "", BOOL, False, (), _ALL, FETCHING,
     "fetch over http"),
    ("nv", "", BOOL, False, ("NV",), _ALL, SUPPORTED,
     "NVIDIA support: libraries, programs and devices by nvliblist.conf"),
    ("nvccli", "", BOOL, False, ("NVCCLI",), _ALL, SUPPORTED,
     "NVIDIA support with what nvidia-container-cli lists for NVIDIA_VISIBLE_DEVICES (not in the "
     "setuid flow)"),
    ("oci", "", BOOL, False, ("OCI",), ACTIONS, SUPPORTED,
     "behave as OCI runtimes do, by the image's OCI configuration: its user, entry point and "
     "directory, nothing of the host but what is asked for, all that is written lost in the end"),
    ("oom-kill-disable", "", BOOL, False, ("OOM_KILL_DISABLE",), _ALL, SUPPORTED,
     "do not let the kernel kill processes when memory is short"),
    ("overlay", "o", LIST, (), ("OVERLAY", "OVERLAYIMAGE"), _ALL, SUPPORTED,
     "image or directory to lay over the container: path[:ro]"),
    ("passphrase", "", BOOL, False, (), _ALL, REFUSED,
     "ask for the passphrase of an encrypted image"),
    ("pem-path", "", STRING, "", (), _ALL, REFUSED,
     "RSA key of an encrypted image"),
    ("pid", "p", BOOL, False, ("PID", "UNSHARE_PID"), _ALL, SUPPORTED,
     "a new PID namespace"),
    ("pid-file", "", STRING, "", ("PID_FILE",), INSTANCES, SUPPORTED,
     "write the process number of the instance to this file"),
    ("pid-file", "", STRING, "", ("PID_FILE",), _OCI_MAKE, SUPPORTED,
     "file for the number of the first process"),
    ("pidfd-socket", "", STRING, "", (), _OCI_MAKE, SUPPORTED,
     "socket that is given a pidfd of the first process"),
    ("pids-limit", "", INT, 0, ("PIDS_LIMIT",), _ALL, SUPPORTED,
     "how many processes the container may have, -1 for any number"),
    ("preserve-fds", "", INT, 0, (), _OCI_MAKE, SUPPORTED,
     "how many more open files the container is given"),
    ("pwd", "", STRING, "", ("PWD", "TARGET_PWD"), ACTIONS, SUPPORTED,
     "working directory inside the container"),
    ("quiet", "q", BOOL, False, ("QUIET",), ROOT, SUPPORTED,
     "print warnings and errors only"),
    ("remove", "r", BOOL, False, (), ("config fakeroot",), SUPPORTED,
     "take a user's ranges away"),
    ("reset", "r", BOOL, False, (), ("config global",), SUPPORTED,
     "give a directive its default value"),
    ("rocm", "", BOOL, False, ("ROCM",), _ALL, SUPPORTED,
     "ROCm support: libraries, programs and devices by rocmliblist.conf"),
    ("runscript", "r", BOOL, False, (), ("inspect",), SUPPORTED,
     "show what `run` starts"),
    ("runscript-timeout", "", STRING, "", ("RUNSCRIPT_TIMEOUT",), ("run", "instance run"), REFUSED,
     "how long the start script may take"),
    ("scratch", "S", LIST, (), ("SCRATCH", "SCRATCHDIR"), _ALL, SUPPORTED,
     "directory of the container that is writable and empty (-W says where it is kept)"),
    ("security", "", LIST, (), ("SECURITY",), _ALL, SUPPORTED,
     "settings for SELinux, AppArmor, seccomp, and uid or gid for root: selinux:label, "
     "apparmor:profile, seccomp:file, uid:number, gid:number[:number...]"),
    ("set", "s", BOOL, False, (), ("config global",), SUPPORTED,
     "set a directive, or add to one that has several values"),
    ("sharens", "", BOOL, False, ("SHARENS",), ACTIONS, SUPPORTED,
     "live in one container with the other launches of the same image by the same parent "
     "process, in the user-namespace flow"),
    ("shell", "s", STRING, "", ("SHELL",), ("shell",), SUPPORTED,
     "shell to start"),
    ("signal", "s", STRING, "SIGTERM", ("SIGNAL",), _OCI_ONE, SUPPORTED,
     "signal to send"),
    ("signal", "s", STRING, "", ("SIGNAL",), ("instance stop",), SUPPORTED,
     "signal to send, by name or number (SIGINT, or what the image's label says)"),
    ("silent", "s", BOOL, False, ("SILENT",), ROOT, SUPPORTED,
     "print errors only"),
    ("startscript", "s", BOOL, False, (), ("inspect",), SUPPORTED,
     "show what an instance starts"),
    ("sync-socket", "s", STRING, "", ("SYNC_SOCKET",), (*_OCI_MAKE, "oci state"), SUPPORTED,
     "socket that is told the state, at each change"),
    ("test", "t", BOOL, False, (), ("inspect",), SUPPORTED,
     "show what `test` starts"),
    ("timeout", "t", INT, 0, (), _OCI_ONE, SUPPORTED,
     "seconds after which SIGKILL follows"),
    ("timeout", "t", INT, 10, (), ("instance stop",), SUPPORTED,
     "seconds after which the instance is killed"),
    ("tmpdir", "", STRING, "", ("TMPDIR",), _ALL, FETCHING,
     "directory for temporary files while an image is fetched"),
    ("trace", "", STRING, "", (), ROOT, SUPPORTED,
     "append what happens to this file, one JSON object a line"),
    ("underlay", "", BOOL, False, ("UNDERLAY",), _ALL, SUPPORTED,
     "lay the image under a directory of bind mounts, without overlay"),
    ("unset", "u", BOOL, False, (), ("config global",), SUPPORTED,
     "remove a value from a directive"),
    ("unsquash", "", BOOL, False, ("UNSQUASH",), _ALL, REFUSED,
     "unpack the image to a directory first"),
    ("user", "", STRING, "", (), ("config show",), SUPPORTED,
     "show what applies to this user"),
    ("user", "u", STRING, "", ("USER",),
     ("instance list", "instance stats", "instance stop"), SUPPORTED,
     "instances of this user (root only)"),
    ("user", "u", STRING, "", ("CAP_USER",), _GRANTING, SUPPORTED,
     "user whose capabilities change"),
    ("userns", "u", BOOL, False, ("USERNS", "UNSHARE_USERNS"), _ALL, SUPPORTED,
     "a new user namespace, without the setuid starter"),
    ("uts", "", BOOL, False, ("UTS", "UNSHARE_UTS"), _ALL, SUPPORTED,
     "a new UTS namespace"),
    ("verbose", "v", BOOL, False, ("VERBOSE",), ROOT, SUPPORTED,
     "print more messages"),
    ("version", "", BOOL, False, (), ROOT, SUPPORTED,
     "version of this program"),
    ("workdir", "W", STRING, "", ("WORKDIR",), _ALL, SUPPORTED,
     "directory that keeps /tmp, /var/tmp and $HOME (with --contain)"),
    ("writable", "w", BOOL, False, ("WRITABLE",), _ALL, SUPPORTED,
     "write to the image itself"),
    ("writable-tmpfs", "", BOOL, False, ("WRITABLE_TMPFS",), _ALL, SUPPORTED,
     "writable, but everything written is lost in the end"),
)  # fmt: skip

HIDDEN: Final = frozenset((
    "containlibs", "dmtcp-launch", "dmtcp-restart", "docker-password", "docker-username",
    "ignore-fakeroot-command", "ignore-subuid", "ignore-userns", "no-nv", "no-rocm", "nohttps",
    "pwd", "tmpdir", "underlay",
))  # fmt: skip
DEPRECATED: Final = {
    "nohttps": "use --no-https",
    "underlay": "default overlay is preferred",
}
SYNONYMS: Final = {"pwd": "cwd", "nohttps": "no-https"}
# These are collected from the command line and the environment, the others taken from one.
ADDING: Final = ("bind", "mount")
# An option on the left switches those on the right on.
IMPLIED: Final = (
    ("compat", ("containall", "no-init", "no-umask", "no-eval", "writable-tmpfs")),
    ("containall", ("contain", "cleanenv", "ipc", "pid")),
    ("hostname", ("uts",)),
)

# path, synopsis, fewest and most arguments (-1: any number), status, one line of help
COMMANDS: Final[tuple[Command, ...]] = (
    ("build", "<image> <spec>", 2, 2, REFUSED, "Build an image"),
    ("buildcfg", "[parameter]", 0, 1, SUPPORTED, "Print the paths that are compiled in"),
    ("cache", "", 0, -1, REFUSED, "Manage the cache of fetched images"),
    ("capability", "<command>", 0, -1, SUPPORTED, "Manage capabilities of users and groups"),
    ("capability add", "[add options...] <capabilities>", 1, 1, SUPPORTED,
     "Grant capabilities to a user or group (root only)"),
    ("capability avail", "[capabilities]", 0, 1, SUPPORTED, "Say what capabilities allow"),
    ("capability drop", "[drop options...] <capabilities>", 1, 1, SUPPORTED,
     "Take capabilities from a user or group (root only)"),
    ("capability list", "[user/group]", 0, 1, SUPPORTED,
     "Show what users and groups were granted"),
    ("checkpoint", "", 0, -1, REFUSED, "Manage checkpoints of containers"),
    ("completion", "", 0, -1, SUPPORTED, "Print a completion script for a shell"),
    ("completion bash", "", 0, 0, SUPPORTED, "Print the completion script for bash"),
    ("completion fish", "", 0, 0, SUPPORTED, "Print the completion script for fish"),
    ("completion powershell", "", 0, 0, REFUSED, "Print the completion script for PowerShell"),
    ("completion zsh", "", 0, 0, SUPPORTED, "Print the completion script for zsh"),
    ("confgen", "[old file] <new file>", 0, -1, REFUSED, "Write a new configuration file"),
    ("config", "", 0, -1, SUPPORTED, "Read, check and change the configuration"),
    ("config check", "[--json] [file]", 0, 1, SUPPORTED,
     "List what is wrong with the configuration, or not enforced"),
    ("config fakeroot", "<option> <user>", 1, 1, SUPPORTED,
     "Manage who has subordinate ids for --fakeroot (root user only)"),
    ("config global", "<option> <directive> [value,...]", 1, 2, SUPPORTED,
     "Read or change a directive of the configuration file"),
    ("config show", "[--effective] [--user <name>] [file]", 0, 1, SUPPORTED,
     "Print the configuration and where each value came from"),
    ("delete", "<image>", 1, 1, REFUSED, "Delete an image from a library"),
    ("exec", "[exec options...] <container> <command>", 2, -1, SUPPORTED,
     "Run a command within a container"),
    ("help", "[command]", 0, -1, SUPPORTED, "Help about any command"),
    ("inspect", "[inspect options...] <image path>", 1, 1, SUPPORTED,
     "Show what an image says about itself"),
    ("instance", "<command>", 0, -1, SUPPORTED, "Manage containers that run as services"),
    ("instance list", "[list options...] [<instance name glob>]", 0, 1, SUPPORTED,
     "List all running and named instances"),
    ("instance run", "[run options...] <container path> <instance name> [args...]", 2, -1,
     SUPPORTED, "Run a named instance of a container: its runscript"),
    ("instance start", "[start options...] <container path> <instance name> [args...]", 2, -1,
     SUPPORTED, "Start a named instance of a container"),
    ("instance stats", "[stats options...] <instance name>", 1, 1, SUPPORTED,
     "Show what a named instance uses"),
    ("instance stop", "[stop options...] [instance]", 0, 1, SUPPORTED, "Stop a named instance"),
    ("key", "", 0, -1, REFUSED, "Manage OpenPGP keys"),
    ("keyserver", "", 0, -1, REFUSED, "Manage key servers"),
    ("oci", "<command>", 0, -1, SUPPORTED, "Manage OCI containers"),
    ("oci attach", "<container_ID>", 1, 1, SUPPORTED,
     "Attach console to a running container process"),
    ("oci create", "-b <bundle_path> [create options...] <container_ID>", 1, 1, SUPPORTED,
     "Create a container from a bundle directory"),
    ("oci delete", "<container_ID>", 1, 1, SUPPORTED, "Delete container"),
    ("oci exec", "<container_ID> <command> <args>", 1, -1, SUPPORTED,
     "Execute a command within container"),
    ("oci kill", "[kill options...] <container_ID>", 1, 2, SUPPORTED, "Kill a container"),
    ("oci mount", "<sif_image> <bundle_path>", 2, 2, SUPPORTED,
     "Mount create an OCI bundle from SIF image (root user only)"),
    ("oci pause", "<container_ID>", 1, 1, SUPPORTED,
     "Suspends all processes inside the container"),
    ("oci resume", "<container_ID>", 1, 1, SUPPORTED,
     "Resumes all processes previously paused inside the container"),
    ("oci run", "-b <bundle_path> [run options...] <container_ID>", 1, 1, SUPPORTED,
     "Create/start/attach/delete a container from a bundle directory"),
    ("oci start", "<container_ID>", 1, 1, SUPPORTED, "Start container process"),
    ("oci state", "<container_ID>", 1, 1, SUPPORTED, "Query state of a container"),
    ("oci umount", "<bundle_path>", 1, 1, SUPPORTED, "Umount delete bundle (root user only)"),
    ("oci update", "[update options...] <container_ID>", 1, 1, SUPPORTED,
     "Update container cgroups resources"),
    ("overlay", "", 0, -1, REFUSED, "Manage writable overlay images"),
    ("plugin", "", 0, -1, REFUSED, "Manage plug-ins"),
    ("pull", "[pull options...] [output file] <URI>", 1, 2, REFUSED, "Fetch an image"),
    ("push", "<image> <URI>", 2, 2, REFUSED, "Upload an image"),
    ("registry", "", 0, -1, REFUSED, "Manage accounts of OCI registries"),
    ("remote", "", 0, -1, REFUSED, "Manage remote services"),
    ("run", "[run options...] <container> [args...]", 1, -1, SUPPORTED,
     "Run the default command of a container"),
    ("run-help", "<image path>", 1, 1, SUPPORTED, "Show the help text of an image"),
    ("search", "<words>", 1, 1, REFUSED, "Search a library for images"),
    ("shell", "[shell options...] <container>", 1, -1, SUPPORTED,
     "Run a shell within a container"),
    ("sif", "", 0, -1, SUPPORTED, "Look into SIF images"),
    ("sif add", "<path> <object>", 2, 2, REFUSED, "Add a data object"),
    ("sif del", "<id> <path>", 2, 2, REFUSED, "Delete a data object"),
    ("sif dump", "<id> <sif_path>", 2, 2, SUPPORTED, "Write a data object to stdout"),
    ("sif header", "<sif_path>", 1, 1, SUPPORTED, "Print the global header"),
    ("sif info", "<id> <sif_path>", 2, 2, SUPPORTED, "Print what is known of a data object"),
    ("sif list", "<sif_path>", 1, 1, SUPPORTED, "List the data objects"),
    ("sif new", "<path>", 1, 1, REFUSED, "Make an empty SIF image"),
    ("sif setprim", "<id> <path>", 2, 2, REFUSED, "Choose the primary system partition"),
    ("sign", "[sign options...] <image path>", 1, 1, REFUSED, "Sign an image"),
    ("test", "[exec options...] <image path>", 1, -1, SUPPORTED,
     "Run the test script of a container"),
    ("verify", "[verify options...] <image path>", 1, 1, REFUSED, "Verify signatures of an image"),
    ("version", "", 0, -1, SUPPORTED, "Print the version of this program"),
)  # fmt: skip

HIDDEN_COMMANDS: Final = ("buildcfg", "checkpoint", "confgen")
# Elsewhere the first argument ends the options.
INTERSPERSED: Final = (
    *_SIF, "sif", "completion", "help", "instance list", "instance stats", "instance stop",
    "oci attach", "oci create", "oci delete", "oci kill",
    "oci mount", "oci pause", "oci resume", "oci run", "oci start", "oci state", "oci umount",
    "oci update",
)  # fmt: skip
# Groups that explain themselves when the command after them is missing or unknown.
GROUPS: Final = ("sif", "config", "capability", "completion", "instance", "oci")

# `name:` without slashes is a transport only if it is one of these (uri.Split of Apptainer).
TRANSPORTS: Final = (
    "docker", "docker-archive", "docker-daemon", "http", "https", "library", "oci", "oci-archive",
    "oras", "shub",
)  # fmt: skip

# Images that lie on this machine, for --oci.
LAYOUTS: Final = ("oci", "oci-archive")


def transport(image: str) -> str:
    """Return what stands before `://` or a known transport's colon, "" for a path."""
    name, colon, rest = image.partition(":")
    if colon and (rest.startswith("//") or name in TRANSPORTS):
        return name
    return ""


def command_row(path: str) -> Command | None:
    """Return the row of `path` ("sif list"), or None."""
    for row in COMMANDS:
        if row[0] == path:
            return row
    return None


def options_of(path: str) -> list[Option]:
    """Return the rows of the options that `path` takes; "" is the program itself."""
    return [row for row in OPTIONS if path in row[5]]
