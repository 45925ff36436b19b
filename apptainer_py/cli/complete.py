"""Completion scripts for bash, zsh, fish and PowerShell, made from the table."""

from __future__ import annotations

from apptainer_py.cli.table import (
    BOOL,
    COMMANDS,
    GROUPS,
    HIDDEN,
    HIDDEN_COMMANDS,
    PROGRAM,
    REFUSED,
    SUPPORTED,
    options_of,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from apptainer_py.cli.table import Command, Option

_PROGRAMS = (PROGRAM, "apptainer", "singularity")


def script(shell: str, *, descriptions: bool = True) -> str:
    """Return the script for `shell`: "bash", "zsh", "fish" or "powershell"."""
    if shell == "fish":
        return _fish(descriptions=descriptions)
    if shell == "powershell":
        return _powershell(descriptions=descriptions)
    if shell == "zsh":
        # zsh understands bash's way since 4.2; its own would need the table a third time.
        return f"#compdef {PROGRAM}\nautoload -U +X bashcompinit && bashcompinit\n{_bash()}"
    return _bash()


def _commands() -> Iterator[Command]:
    from apptainer_py.cli import plugins

    for row in sorted([*COMMANDS, *plugins.rows()]):
        if row[4] == SUPPORTED and row[0] not in HIDDEN_COMMANDS:
            yield row


def _shown(path: str) -> list[Option]:
    return [row for row in options_of(path) if row[6] != REFUSED and row[0] not in HIDDEN]


def _words(path: str, *, values: bool) -> str:
    """Return the options of `path`; with `values`, only those that take one."""
    words = []
    for row in _shown(path):
        if not values or row[2] != BOOL:
            words += [f"-{row[1]}"] if row[1] else []
            words.append(f"--{row[0]}")
    return " ".join(words if values else [*words, "-h", "--help"])


_BASH = """\
# completion for {program}
__{name}_options() {{
    case "$1" in
{options}
    esac
}}

__{name}_values() {{
    case "$1" in
{values}
    esac
}}

__{name}_commands() {{
    case "$1" in
{commands}
    esac
}}

# Walks over what was typed: sets `command`, and `place` to command, value or argument.
# Also run by zsh, which counts the elements of arrays from 1.
__{name}_walk() {{
    local word number=0
    command="" place=command
    for word in "${{COMP_WORDS[@]}}"; do
        number=$((number + 1))
        if ((number == 1 || number > COMP_CWORD)); then
            continue
        elif [[ $place == value ]]; then
            place=$after
        elif [[ $place == argument ]]; then
            return
        elif [[ $word == -* ]]; then
            [[ " $(__{name}_values "$command") " == *" $word "* ]] && after=$place place=value
        elif [[ -n $command && -z $(__{name}_commands "$command") ]]; then
            place=argument
        else
            command="${{command:+$command }}$word"
        fi
    done
}}

__{name}_complete() {{
    local command place after current=$2
    COMPREPLY=()
    __{name}_walk
    if [[ $place == command && $current == -* ]]; then
        COMPREPLY=($(compgen -W "$(__{name}_options "$command")" -- "$current"))
    elif [[ $place == command ]]; then
        COMPREPLY=($(compgen -W "$(__{name}_commands "$command")" -- "$current"))
    fi
}}

complete -o default -F __{name}_complete {programs}
"""


def _bash() -> str:
    paths = ["", *(row[0] for row in _commands())]

    def cases(texts: Iterator[tuple[str, str]]) -> str:
        return "\n".join(f'    "{path}") echo "{text}" ;;' for path, text in texts if text)

    return _BASH.format(
        program=PROGRAM,
        name=PROGRAM.replace("-", "_"),
        programs=" ".join(_PROGRAMS),
        options=cases((path, _words(path, values=False)) for path in paths),
        values=cases((path, _words(path, values=True)) for path in paths),
        commands=cases((path, " ".join(_below(path))) for path in paths),
    )


def _below(path: str) -> list[str]:
    if path == "help":
        return _below("")
    if path and path not in GROUPS:
        return []
    start = f"{path} " if path else ""
    names = [row[0][len(start) :] for row in _commands() if row[0].startswith(start)]
    return [name for name in names if name and " " not in name]


def _fish(*, descriptions: bool) -> str:
    lines = [f"# completion for {PROGRAM}"]
    for program in _PROGRAMS:
        lines += _fish_lines(program, descriptions=descriptions)
    return "\n".join(lines) + "\n"


def _fish_lines(program: str, *, descriptions: bool) -> Iterator[str]:
    def about(text: str) -> str:
        escaped = text.replace("\\", "\\\\").replace("'", "\\'")
        return f" -d '{escaped}'" if descriptions else ""

    for row in _commands():
        group, _, name = row[0].rpartition(" ")
        where = f"__fish_seen_subcommand_from {group}" if group else "__fish_use_subcommand"
        yield f"complete -c {program} -n '{where}' -a {name}{about(row[5])}"
    for path in ["", *(row[0] for row in _commands())]:
        words = [f"__fish_seen_subcommand_from {word}" for word in path.split()]
        where = "; and ".join(words) or "__fish_use_subcommand"
        for option in _shown(path):
            letter = f" -s {option[1]}" if option[1] else ""
            value = "" if option[2] == BOOL else " -r"
            yield (
                f"complete -c {program} -n '{where}'{letter} -l {option[0]}{value}"
                f"{about(option[7])}"
            )


_POWERSHELL = """\
# completion for {program}
Register-ArgumentCompleter -Native -CommandName {programs} -ScriptBlock {{
    param($wordToComplete, $commandAst, $cursorPosition)
    # A word, and behind a space what it is.
    $options = @{{
{options}
    }}
    $values = @{{
{values}
    }}
    $commands = @{{
{commands}
    }}
    $command = ''
    $isValue = $false
    foreach ($element in ($commandAst.CommandElements | Select-Object -Skip 1)) {{
        if ($element.Extent.EndOffset -ge $cursorPosition) {{ break }}
        $word = $element.ToString()
        if ($isValue) {{
            $isValue = $false
        }} elseif ($word.StartsWith('-')) {{
            $isValue = $values[$command] -ccontains $word
        }} elseif ($command -and -not $commands.ContainsKey($command)) {{
            return
        }} else {{
            $command = "$command $word".Trim()
        }}
    }}
    if ($isValue) {{ return }}
    $found = $commands[$command]
    if ("$wordToComplete".StartsWith('-')) {{ $found = $options[$command] }}
    $found | Where-Object {{ $_ -and $_.StartsWith("$wordToComplete") }} | ForEach-Object {{
        $name, $about = $_ -split ' ', 2
        if (-not $about) {{ $about = $name }}
        [System.Management.Automation.CompletionResult]::new($name, $name, 'ParameterValue', $about)
    }}
}}
"""


def _powershell(*, descriptions: bool) -> str:
    paths = ["", *(row[0] for row in _commands())]
    about = {row[0]: row[5] for row in _commands()}

    def quoted(word: str, text: str = "") -> str:
        both = f"{word} {text}" if text and descriptions else word
        return "'" + both.replace("'", "''") + "'"

    def options(path: str) -> list[str]:
        found = []
        for row in _shown(path):
            found += [quoted(f"-{row[1]}", row[7])] if row[1] else []
            found.append(quoted(f"--{row[0]}", row[7]))
        return [*found, quoted("--help", "help for this command")]

    def below(path: str) -> list[str]:
        start = f"{path} " if path and path != "help" else ""
        return [quoted(name, about[f"{start}{name}"]) for name in _below(path)]

    def table(rows: Iterator[tuple[str, list[str]]]) -> str:
        return "\n".join(f"        '{path}' = @({', '.join(row)})" for path, row in rows if row)

    return _POWERSHELL.format(
        program=PROGRAM,
        programs=", ".join(quoted(name) for name in _PROGRAMS),
        options=table((path, options(path)) for path in paths),
        values=table(
            (path, [quoted(word) for word in _words(path, values=True).split()]) for path in paths
        ),
        commands=table((path, below(path)) for path in paths),
    )
