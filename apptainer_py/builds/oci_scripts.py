"""What an OCI image says about its start, as the scripts of a SIF image."""

from __future__ import annotations

from apptainer_py.builds.skeleton import META, write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.image.oci_config import ImageConfig

_RUN = """\
#!/bin/sh
# Entry point and command of the OCI image; arguments take the command's place.
escaped() {{
    rest=$1 word=
    while :; do
        case $rest in
            *\\"*) word="$word${{rest%%\\"*}}\\\\\\""; rest=${{rest#*\\"}} ;;
            *) word=$word$rest; return ;;
        esac
    done
}}
if [ $# -eq 0 ]; then
    set -- {command}
    live_command={live_command}
else
    live_command=
    for argument in "$@"; do
        escaped "$argument"
        live_command="$live_command \\"$word\\""
    done
fi
if [ -n "${{APPTAINER_NO_EVAL:-}}${{SINGULARITY_NO_EVAL:-}}" ]; then
    set -- {entrypoint}"$@"
else
    eval "set -- "{live_entrypoint}" $live_command"
fi
[ $# -gt 0 ] || set -- /bin/sh
exec "$@"
"""


def quoted(word: str) -> str:
    """Return a word as a shell reads it literally."""
    return "'" + word.replace("'", "'\"'\"'") + "'"


def _live(words: tuple[str, ...]) -> str:
    """Return a literal that `eval` reads as these words, variables in them replaced."""
    text = " ".join(
        '"' + word.replace("\\", "\\\\").replace('"', '\\"').replace("`", "\\`") + '"'
        for word in words
    )
    return quoted(text)


def write_scripts(root: str, config: ImageConfig) -> None:
    """Write the run script and the variables of an image.

    Raises:
        OSError: a file cannot be written.
    """
    entrypoint = "".join(f"{quoted(word)} " for word in config.entrypoint)
    text = _RUN.format(
        command=" ".join(map(quoted, config.command)),
        live_command=_live(config.command),
        entrypoint=entrypoint,
        live_entrypoint=_live(config.entrypoint),
    )
    write(root, f"{META}/runscript", text, 0o755)
    write(root, f"{META}/env/10-docker2singularity.sh", variables(config.environment), 0o755)


def variables(entries: tuple[str, ...]) -> str:
    """Return the script that sets an image's variables, those of the caller apart (but PATH)."""
    lines = ["#!/bin/sh\n"]
    for entry in entries:
        name, _, value = entry.partition("=")
        if not name.replace("_", "a").isalnum() or not name.isascii() or name[0].isdigit():
            continue
        if name == "PATH":
            lines.append(f"export PATH={quoted(value)}\n")
            continue
        lines.append(f'if [ -z "${{{name}:-}}" ]; then\n    {name}={quoted(value)}\nfi\n')
        lines.append(f"export {name}\n")
    return "".join(lines)
