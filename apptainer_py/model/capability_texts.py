"""What each capability lets a process do, in a line; the whole of it is in capabilities(7)."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

TEXTS: Final = {
    "AUDIT_CONTROL": "switch the kernel's auditing, change its rules and read its state",
    "AUDIT_READ": "follow the audit log on a netlink socket",
    "AUDIT_WRITE": "add records to the audit log",
    "BLOCK_SUSPEND": "keep the machine from going to sleep",
    "BPF": "load BPF programs and make BPF maps that others may not",
    "CHECKPOINT_RESTORE": "choose process numbers and read the mapped files of other processes",
    "CHOWN": "give files to any user and any group",
    "DAC_OVERRIDE": "read, write and execute files whatever their mode says",
    "DAC_READ_SEARCH": "read files and search directories whatever their mode says, and open "
    "files by their handle",
    "FOWNER": "do to any file what only its owner may: mode, times, ACLs, flags",
    "FSETID": "keep the setuid and setgid bits of a file that is written to",
    "IPC_LOCK": "lock any amount of memory",
    "IPC_OWNER": "use System V IPC objects of other users",
    "KILL": "send signals to processes of other users",
    "LEASE": "take leases on files of other users",
    "LINUX_IMMUTABLE": "make files immutable or append-only, and undo it",
    "MAC_ADMIN": "change the rules of a mandatory access control such as Smack",
    "MAC_OVERRIDE": "pass a mandatory access control such as Smack",
    "MKNOD": "make device files",
    "NET_ADMIN": "set up interfaces, routes, firewalls and everything else of a network",
    "NET_BIND_SERVICE": "listen on ports below 1024",
    "NET_BROADCAST": "nothing; the kernel asks for it nowhere",
    "NET_RAW": "use raw and packet sockets, and bind to foreign addresses",
    "PERFMON": "watch the performance of the kernel and of other processes",
    "SETFCAP": "give capabilities to files",
    "SETGID": "take on any group, and map groups of a user namespace",
    "SETPCAP": "take capabilities from the bounding set, change securebits",
    "SETUID": "become any user, and map users of a user namespace",
    "SYSLOG": "read the kernel's log and the addresses that it hides",
    "SYS_ADMIN": "mount, make namespaces, and most of what else is root's: as good as root",
    "SYS_BOOT": "restart the machine, or start another kernel",
    "SYS_CHROOT": "change the root directory and enter mount namespaces",
    "SYS_MODULE": "load kernel modules: as good as root",
    "SYS_NICE": "raise priorities and set the scheduling of any process",
    "SYS_PACCT": "switch process accounting",
    "SYS_PTRACE": "trace any process, read and write its memory",
    "SYS_RAWIO": "reach devices, ports and memory of the machine directly: as good as root",
    "SYS_RESOURCE": "pass resource limits, quotas and reserved space",
    "SYS_TIME": "set the clock",
    "SYS_TTY_CONFIG": "configure virtual terminals, and hang them up",
    "WAKE_ALARM": "wake the machine by a timer",
}
