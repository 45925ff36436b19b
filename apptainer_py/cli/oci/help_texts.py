"""What the help of runc's command line says of each command and each flag."""

from __future__ import annotations

_NAME = "<container-id> is the name of the container, unique on this host."

# Command → what its help adds below the usage.
DETAILS = {
    "checkpoint": "Writes the state of a running container to files, with CRIU, and ends it.",
    "create": f"{_NAME} The bundle is a directory with config.json and the root file\n"
    "system. The container's process is made, and waits for `start`.",
    "delete": f"{_NAME} One that is not stopped\nneeds --force.",
    "events": "Prints one JSON object every interval, and one whenever memory runs out.",
    "exec": "Starts one more process in a running container. It is described by the\n"
    "command line, or by a file with the `process` object of config.json.",
    "features": "Prints what this runtime knows as one JSON object (specification, features.md).",
    "kill": "The signal is a number or a name, with or without SIG: 9, KILL, SIGKILL.",
    "list": "Prints the containers whose state lies below --root.",
    "pause": "Freezes the container's cgroup; `resume` thaws it.",
    "ps": "What follows the container's name goes to ps(1); default: -ef.",
    "restore": "Makes a container again from what `checkpoint` has written.",
    "resume": "Thaws the container's cgroup.",
    "run": f"{_NAME} `create` and `start` in one; without --detach it waits for\n"
    "the process, returns its status, and deletes the container.",
    "spec": "Writes a config.json that starts a shell in rootfs/ of the bundle.",
    "start": "Lets a container that `create` has made begin its program.",
    "state": "Prints the container's state as JSON (runtime specification, State).",
    "update": "The file holds the keys that change, as in linux.resources of config.json,\n"
    'such as {"memory": {"limit": 0, "swap": 0}, "cpu": {"quota": 0}, "pids": {"limit": 0}}.\n'
    "Where it is given, the other options are not looked at.",
}

GLOBAL = {
    "debug": "write debugging messages to the log",
    "log": "file for the log (default: standard error)",
    "log-format": "form of the log, text or json (default: text)",
    "root": "directory of the containers' state (default: /run/apptainer-py-oci, or "
    "$XDG_RUNTIME_DIR/apptainer-py-oci for an ordinary user)",
    "criu": "path of criu (default: criu, looked up in PATH)",
    "systemd-cgroup": "let systemd make the cgroups; cgroupsPath is then slice:prefix:name",
    "rootless": "ignore cgroup permission errors: true, false or auto (default: auto)",
    "cgroup-manager": "who makes the cgroups: cgroupfs, systemd or disabled",
    "log-level": "the least level that is logged; debug is the same as --debug",
    "help": "show help",
    "version": "print the version",
}

# Flag → what it does, in every command that has it, but for those below.
FLAGS = {
    "additional-gids": "additional group ids of the process",
    "all": "of no effect: signals go to every process where there is no pid namespace",
    "apparmor": "AppArmor profile of the process",
    "auto-dedup": "free the memory pages in the image files that have been read",
    "blkio-weight": "weight of block input and output, 10 to 1000",
    "bundle": "directory of the bundle (default: the current directory)",
    "cap": "capability that the process has beside the others",
    "cgroup": "run the process in this cgroup below the container's, [CONTROLLER,...:]PATH",
    "config": "file to be read instead of the bundle's config.json",
    "console-socket": "AF_UNIX socket that is sent the descriptor of the console's master end",
    "cpu-burst": "time by which the quota may be exceeded once it was saved up (microseconds)",
    "cpu-idle": "1: run only when nobody else wants to (SCHED_IDLE); 0: as usual",
    "cpu-period": "period of the quota (microseconds)",
    "cpu-quota": "processor time allowed in each period (microseconds)",
    "cpu-rt-period": "period of the real-time allowance (microseconds)",
    "cpu-rt-runtime": "real-time allowance in each period (microseconds)",
    "cpu-share": "share of processor time, relative to other cgroups",
    "cpuset-cpus": "processors that may be used, as 0-3,5",
    "cpuset-mems": "memory nodes that may be used",
    "cwd": "working directory of the process",
    "detach": "return when the process runs",
    "empty-ns": "namespace that is made anew, not dumped or restored",
    "env": "variable of the process, NAME=VALUE",
    "ext-unix-sk": "allow connections to UNIX sockets outside of the container",
    "file-locks": "handle file locks",
    "force": "kill the container's processes first; no error if there is no such container",
    "format": "form of the output, table or json (default: table)",
    "ignore-paused": "do so even in a paused container",
    "exec-wait-fifo": "run the program once this fifo is opened for reading",
    "image-path": "directory of the image files",
    "interval": "time between two reports, as 5s or 1m (default: 5s)",
    "keep": "do not delete the container when its process ends",
    "kernel-memory": "of no effect (the kernel has no such limit any more)",
    "kernel-memory-tcp": "limit of memory for TCP buffers (bytes)",
    "l3-cache-schema": "Intel RDT/CAT schema of the level-3 cache",
    "lazy-pages": "fetch memory pages when they are first used",
    "leave-running": "let the container go on",
    "link-remap": "make links for files that are open but removed",
    "lsm-mount-context": "SELinux context of mounts in place of the recorded one",
    "lsm-profile": "LSM profile in place of the recorded one, TYPE:NAME",
    "manage-cgroups-mode": "how cgroups are treated: soft, full, strict or ignore",
    "mem-bw-schema": "Intel RDT/MBA schema of memory bandwidth",
    "memory": "limit of memory (bytes)",
    "memory-reservation": "soft limit of memory (bytes)",
    "memory-swap": "limit of memory and swap together (bytes); -1: none",
    "no-new-keyring": "keep the caller's session keyring",
    "no-new-privs": "the process gains no privileges by execve(2)",
    "no-pivot": "enter the root without pivot_root(2), where the host's root is its initramfs",
    "no-subreaper": "do not become the reaper of the container's orphans",
    "page-server": "ADDRESS:PORT of the server that memory pages are sent to",
    "parent-path": "directory of an earlier dump, below image-path, that this one adds to",
    "pid-file": "file that the process id is written to",
    "pidfd-socket": "AF_UNIX socket that is sent a pidfd of the process",
    "pids-limit": "largest number of processes; -1: no limit",
    "pre-dump": "dump memory only, and let the container go on",
    "preserve-fds": "further descriptors to pass on, from 3 (beyond those of $LISTEN_FDS)",
    "process": "file with the process as JSON",
    "process-label": "SELinux label of the process",
    "quiet": "print names only",
    "resources": "file with the resources to change; -: standard input",
    "rootless": "a configuration for an ordinary user",
    "shell-job": "allow terminals of the caller's session",
    "stats": "print one report and end",
    "status-fd": "descriptor that a byte is written to when the page server is ready",
    "stay": "stay until the process ends, with its status; a byte on this descriptor says that it "
    "runs or waits",
    "tcp-established": "allow open TCP connections",
    "tcp-skip-in-flight": "leave out TCP connections that are not established yet",
    "tty": "give the process a terminal",
    "user": "user and group ids of the process, UID[:GID]",
    "work-path": "directory of CRIU's own files and logs",
}

OF_COMMANDS = {
    ("exec", "pid-file"): "file that the id of the new process is written to",
    ("ps", "format"): "form of the output, table or json (default: table)",
}
