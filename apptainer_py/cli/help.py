"""Help and usage texts, made from the table in the shape that cobra gives Apptainer's."""

from __future__ import annotations

from apptainer_py.cli.table import (
    ACTIONS,
    BOOL,
    COMMANDS,
    HIDDEN,
    HIDDEN_COMMANDS,
    INT,
    MAP,
    OCI_ONLY,
    PROGRAM,
    REFUSED,
    STRING,
    command_row,
    options_of,
)
from apptainer_py.cli.values import plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from apptainer_py.cli.table import Command, Option

_WIDTH = 80
_IMAGES = """
An image is a file or a directory:

  *.sif        SIF, as Apptainer and Singularity write it
  *.sqsh       a bare squashfs file system
  directory/   a sandbox, with a whole root file system in it"""
_ABOUT = {
    "": "Containers for shared machines: an image is started as an ordinary program of the user "
    "who starts it, with the files of that user at hand.",
    "exec": "Starts a command in a container and returns its status. What follows the name of "
    "the command belongs to it." + _IMAGES,
    "run": "Starts what the image was made to start (its runscript), with the arguments that "
    "follow the image." + _IMAGES,
    "shell": "Starts an interactive shell in a container." + _IMAGES,
    "test": "Starts the test script of an image." + _IMAGES,
    "plugin": "Manages plug-ins: Python packages that bring commands of their own. They run with "
    "the rights of who types them; containers have nothing to do with them.",
    "plugin compile": "Packs what the entry points of DIRECTORY/pyproject.toml lead to into a "
    "wheel.",
    "plugin create": "Writes a plug-in with one command, to begin with.",
    "plugin disable": "Takes the commands of a plug-in away; it stays installed.",
    "plugin enable": "Gives a plug-in its commands back.",
    "plugin inspect": "Shows the name, version and commands of a plug-in that is installed, or "
    "lies in a file or directory. Nothing of it is run.",
    "plugin install": "Installs a plug-in, a wheel or an unpacked one, for all users of this "
    "machine, in place of another version of it.",
    "plugin list": "Lists the plug-ins that are installed, and whether they are enabled.",
    "plugin uninstall": "Removes a plug-in.",
    "inspect": "Shows labels, definition file, environment and scripts of an image without "
    "starting it. Several options show several parts; labels are shown if there is none.",
    "run-help": "Prints the text that the image's author wrote for those who run it (%help); --app "
    "prints that of a SCIF application.",
    "key": "Manages the OpenPGP keys that images are signed and verified with: the user's, in "
    "~/.apptainer/keys or where APPTAINER_KEYSDIR says, and the machine's public ones.",
    "key export": "Writes a key to a file. A private key keeps its passphrase there.",
    "key import": "Adds the keys of a file, binary or as text, to a keyring.",
    "key list": "Lists the keys of a keyring.",
    "key newpair": "Makes an RSA key pair and adds it to the user's keyrings.",
    "key pull": "Fetches the public key with a fingerprint from a key server and adds it to a "
    "keyring. Compare the fingerprint with its owner first: a key in there is trusted.",
    "key push": "Sends a public key of a keyring to a key server.",
    "key remove": "Removes the key with a fingerprint from a keyring.",
    "key search": "Asks a key server for the keys with these words in their owner's name.",
    "sign": "Adds a digital signature to a SIF image for each group of its objects, for one group, "
    "or for one object. The key is one of the OpenPGP keyring, or in a PEM file.",
    "verify": "Compares a SIF image with the digital signatures in it. The keys are those of the "
    "OpenPGP keyrings and of a key server, one in a PEM file, or that of a certificate.",
    "sif": "Shows the header of a SIF image and the data objects in it, and changes them.",
    "sif add": "Adds the content of a file to a SIF image.",
    "sif del": "Takes a data object out of the table of a SIF image.",
    "sif new": "Makes a SIF image without data objects.",
    "sif setprim": "Makes a system partition the one that is started.",
    "sif list": "Lists the data objects of a SIF image.",
    "sif header": "Prints the global header of a SIF image.",
    "sif info": "Prints what the table of a SIF image says about one data object.",
    "sif dump": "Writes the content of one data object to stdout.",
    "capability": "Grants capabilities to users and groups, takes them back and shows them. A "
    "payload gets what its user was granted and asks for (--add-caps). Some capabilities are as "
    "good as root's password: grant them to people who may be root.",
    "capability add": "Grants capabilities, separated by commas, to a user or a group; `all` means "
    "each of them.",
    "capability drop": "Takes capabilities, separated by commas, from a user or a group; `all` "
    "means each of them.",
    "capability avail": "Says what capabilities allow: all of them, or those that are named.",
    "capability list": "Shows what users and groups were granted: all of them, or one.",
    "config": "Reads, checks and changes the administrator's configuration file.",
    "config global": "Reads or changes one directive of the configuration file; a directive that "
    "may stand several times has all its values separated by commas.",
    "config fakeroot": "Gives users ranges of subordinate ids in /etc/subuid and /etc/subgid, "
    "and takes them away, for --fakeroot; all other lines stay as they are.",
    "config check": "Lists what is wrong with the configuration file, what in it is not enforced, "
    "and why the setuid flow is refused.",
    "config show": "Prints the configuration with the origin of each value; --effective prints "
    "what follows from it, --user for one user.",
    "buildcfg": "Prints the paths and names that are compiled in, or one of them.",
    "completion": "Prints a script that lets a shell complete commands and options.",
    "completion bash": f"To have it at hand:\n\n  source <({PROGRAM} completion bash)",
    "completion zsh": f"To have it at hand:\n\n  source <({PROGRAM} completion zsh)",
    "completion fish": f"To have it at hand:\n\n  {PROGRAM} completion fish | source",
    "help": "Prints the help text of a command.",
    "version": "Prints the version of this program.",
}
_EXAMPLES = {
    "": ("help exec", "exec image.sif cat /etc/os-release"),
    "exec": (
        "exec image.sif cat /etc/os-release",
        "exec --bind /data:/mnt:ro image.sif ls /mnt",
        "exec --containall --env LEVEL=2 sandbox/ env",
    ),
    "run": ("run image.sif", "run --app analysis image.sif --fast input.csv"),
    "shell": ("shell image.sif", "shell --shell /bin/bash --no-home image.sif"),
    "test": ("test image.sif",),
    "inspect": ("inspect image.sif", "inspect --json --runscript image.sif"),
    "plugin": (
        "plugin create greeting greet",
        "plugin compile -o greet.whl greeting",
        "plugin install greet.whl",
    ),
    "sif": ("sif list image.sif", "sif dump 1 image.sif > image.def"),
    "key newpair": ("key newpair", "key list --secret"),
    "sign": ("sign image.sif", "sign --key private.pem image.sif"),
    "verify": ("verify image.sif", "verify --key public.pem image.sif"),
    "config fakeroot": ("config fakeroot --add alice", "config fakeroot --disable alice"),
    "config global": (
        "config global --get 'bind path'",
        "config global --set 'bind path' /etc/resolv.conf",
    ),
    "config show": ("config show --effective --user alice",),
}


def _row(path: str) -> Command | None:
    """Return the row of a command, of a plug-in's too."""
    row = command_row(path)
    if row is None and path:
        from apptainer_py.cli import plugins

        row = plugins.row(path)
    return row


def full(path: str) -> str:
    """Return what `--help` prints for a command, or for the program if `path` is ""."""
    row = _row(path)
    refused = row is not None and row[4] == REFUSED
    head = row[5] if row else "Containers for shared machines, compatible with Apptainer"
    about = "Not supported yet." if refused else _ABOUT.get(path, "")
    synopsis = f"{path} {row[1]}".rstrip() if row else "[global options...]"
    parts = [head, f"Usage:\n  {PROGRAM} {synopsis}"]
    if about:
        parts.append(f"Description:\n{_indented(about)}")
    parts.append(f"Options:\n{_options(path)}")
    commands = _commands(path)
    if commands:
        parts.append(f"Available Commands:\n{commands}")
    if path in _EXAMPLES:
        lines = "\n".join(f"  $ {PROGRAM} {example}" for example in _EXAMPLES[path])
        parts.append(f"Examples:\n{lines}")
    return "\n\n".join(parts) + "\n"


def topic(words: Sequence[str]) -> str:
    """Return what `help` prints for the command that `words` name."""
    if not words:
        return full("")
    for count in (2, 1):
        path = " ".join(words[:count])
        if len(words) >= count and _row(path):
            return full(path)
    shown = " ".join(f"`{plain(word)}`" for word in words)
    return f"Unknown help topic [{shown}]\n{_program_usage()}"


def usage(path: str) -> str:
    """Return what stands on stdout after a wrong number of arguments, or no command."""
    row = command_row(path)
    if row is None:
        return f"{_program_usage()}\n{_more()}"
    synopsis = f"{path} {row[1]}".rstrip()
    return f"Usage:\n  {PROGRAM} [global options...] {synopsis}\n\n{_more()}"


def options(path: str) -> str:
    """Return what stands on stdout after a wrong option."""
    name = path.rpartition(" ")[2] or PROGRAM
    return f"Options for {name} command:\n\n{_options(path)}\n\n{_more()}"


def suggestions(typed: str) -> list[str]:
    """Return the commands that may have been meant, by cobra's rule: two edits, or a prefix."""
    return [
        name
        for name in _visible("")
        if name.startswith(typed.lower()) or _distance(typed.lower(), name) <= 2
    ]


def _distance(one: str, other: str) -> int:
    row = list(range(len(other) + 1))
    for i, a in enumerate(one[:64], 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def _more() -> str:
    return f"Run '{PROGRAM} --help' for more detailed usage information.\n"


def _program_usage() -> str:
    return (
        f"Usage:\n  {PROGRAM} [global options...] <command>\n\n"
        f"Available Commands:\n{_commands('')}\n"
    )


def _visible(path: str) -> list[str]:
    """Return the names of the commands below `path`."""
    start = f"{path} " if path else ""
    names = [row[0] for row in COMMANDS if row[0].startswith(start)]
    rest = [name[len(start) :] for name in names if name not in HIDDEN_COMMANDS]
    below = [name for name in rest if " " not in name]
    if path:
        return below
    from apptainer_py.cli import plugins

    return sorted([*below, *plugins.extras()])


def _commands(path: str) -> str:
    names = _visible(path)
    width = max((len(name) for name in names), default=0)
    lines = []
    for name in names:
        row = _row(f"{path} {name}".strip())
        if row:
            note = " (not supported yet)" if row[4] == REFUSED else ""
            lines.append(f"  {name:<{width}}  {row[5]}{note}")
    return "\n".join(lines)


def _options(path: str) -> str:
    name = path.rpartition(" ")[2] or PROGRAM
    rows: list[tuple[str, str]] = [
        (_left(row), _right(row, path))
        for row in options_of(path)
        if row[0] not in HIDDEN and row[6] != REFUSED
    ]
    rows.append(("  -h, --help", f"help for {name}"))
    rows.sort(key=lambda row: row[0][6:])
    width = max(len(left) for left, _ in rows) + 3
    return "\n".join(_columns(left, right, width) for left, right in rows)


def _left(row: Option) -> str:
    letter = f"-{row[1]}, " if row[1] else "    "
    kind = "" if row[2] == BOOL else f" {row[2]}"
    return f"  {letter}--{row[0]}{kind}"


def _right(row: Option, path: str) -> str:
    text, default = row[7], ""
    if row[0] == "home" and path in ACTIONS:
        default = ' (default "$HOME")'
    elif row[2] == MAP:
        default = " (default [])"
    elif row[2] == STRING and row[3] not in ("", "\0"):
        default = f' (default "{row[3]}")'
    elif row[2] == INT and row[3] not in (0, -1):
        default = f" (default {row[3]})"
    note = f" ({OCI_ONLY})" if row[6] == OCI_ONLY else ""
    return text + default + note


def _columns(left: str, right: str, width: int) -> str:
    import textwrap

    lines = textwrap.wrap(right, _WIDTH - width, break_on_hyphens=False) or [""]
    return f"\n{' ' * width}".join([f"{left:<{width}}{lines[0]}", *lines[1:]])


def _indented(text: str) -> str:
    import textwrap

    paragraph, newline, rest = text.partition("\n")
    wrapped = textwrap.fill(paragraph, _WIDTH - 2) + newline + rest
    return textwrap.indent(wrapped, "  ")
