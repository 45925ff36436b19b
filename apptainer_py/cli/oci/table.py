"""The flags of runc's command line as data: one text a command, one word a flag.

A word is the long name, then `,` and a letter, then what it takes: `=` text, `*` text as often as
wanted, `#` a number, nothing for a switch. starter/lean_scan.c has the words of the commands that
need no interpreter (tests/unit/cli/test_oci_help.py compares them).
"""

from __future__ import annotations

GLOBAL = (
    "debug log= log-format= root= criu= systemd-cgroup rootless= cgroup-manager= log-level= "
    "help,h version,v"
)
# The last two are not runc's: another file than the bundle's (crun), and who stays as the stand-in
# of the process for runtime/library.py, which is told by this descriptor that it stands.
_MAKE = (
    "bundle,b= console-socket= pidfd-socket= pid-file= no-pivot no-new-keyring preserve-fds# "
    "config,f= stay#"
)
_RESTORE = (
    "console-socket= image-path= work-path= tcp-established ext-unix-sk shell-job file-locks "
    "manage-cgroups-mode= bundle,b= detach,d pid-file= no-subreaper no-pivot empty-ns* auto-dedup "
    "lazy-pages lsm-profile= lsm-mount-context="
)
_CHECKPOINT = (
    "image-path= work-path= parent-path= leave-running tcp-established tcp-skip-in-flight "
    "link-remap ext-unix-sk shell-job lazy-pages status-fd# page-server= file-locks pre-dump "
    "manage-cgroups-mode= empty-ns* auto-dedup"
)
_EXEC = (
    "console-socket= pidfd-socket= cwd= env,e* tty,t user,u= additional-gids,g* process,p= "
    "detach,d pid-file= process-label= apparmor= no-new-privs cap,c* preserve-fds# cgroup* "
    "ignore-paused exec-wait-fifo= stay#"
)
_UPDATE = (
    "resources,r= blkio-weight= cpu-period= cpu-quota= cpu-burst= cpu-share= cpu-rt-period= "
    "cpu-rt-runtime= cpuset-cpus= cpuset-mems= kernel-memory= kernel-memory-tcp= memory= "
    "cpu-idle= memory-reservation= memory-swap= pids-limit# l3-cache-schema= mem-bw-schema="
)

# Command → flags, least arguments, most arguments (-1: any number), what else: "x" exact number is
# said, "s" no flag is looked for behind the first argument.
COMMANDS: dict[str, tuple[str, int, int, str]] = {
    "checkpoint": (_CHECKPOINT, 1, 1, "x"),
    "create": (_MAKE, 1, 1, "x"),
    "delete": ("force,f", 1, 1, "x"),
    "events": ("interval= stats", 1, 1, "x"),
    "exec": (_EXEC, 1, -1, "s"),
    "features": ("", 0, 0, "x"),
    "kill": ("all,a", 1, 2, ""),
    "list": ("format,f= quiet,q", 0, 0, "x"),
    "pause": ("", 1, 1, "x"),
    "ps": ("format,f=", 1, -1, "s"),
    "restore": (_RESTORE, 1, 1, "x"),
    "resume": ("", 1, 1, "x"),
    "run": (f"{_MAKE} detach,d keep no-subreaper", 1, 1, "x"),
    "spec": ("bundle,b= rootless", 0, 0, "x"),
    "start": ("", 1, 1, "x"),
    "state": ("", 1, 1, "x"),
    "update": (_UPDATE, 1, 1, "x"),
}

# Apptainer's own `oci` commands whose options are not runc's (cli/table.py), and those that take
# runc's as well.
APPTAINER: dict[str, tuple[str, int, int, str]] = {
    **dict.fromkeys(
        "attach create delete kill mount pause resume run start state umount".split(),
        ("", 0, -1, ""),
    ),
    "exec": (_EXEC, 2, -1, "s"),
    "update": (f"{_UPDATE} from-file,f=", 1, 1, "x"),
}


def flags_of(words: str) -> dict[str, tuple[str, str]]:
    """Return every spelling of a command's flags: name → (long name, what it takes)."""
    found: dict[str, tuple[str, str]] = {}
    for word in words.split():
        takes = word[-1] if word[-1] in "=*#" else ""
        name, _, letter = word.rstrip("=*#").partition(",")
        found[name] = (name, takes)
        if letter:
            found[letter] = (name, takes)
    return found
