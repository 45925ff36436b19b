"""The payload as data: where, with which environment, by which script or program it starts."""

from __future__ import annotations

import os

from apptainer_py.engines.apptainer import environ
from apptainer_py.engines.apptainer.message import pack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from apptainer_py.engines.apptainer.environ import Environment
    from apptainer_py.engines.apptainer.prepare import Prepared
    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.contexts import PrepareContext

# Sources the image's own files the way Apptainer does (facts §5.6.7), in the image's own shell:
# the environment starts almost empty, files in name order, PATH repaired before 90-environment and
# after docker's, our values after 99-base, and what the host forwards last, where it is still free.
_SOURCE = r"""
__fix_path() {
    for __part in /usr/local/sbin /usr/local/bin /usr/sbin /usr/bin /sbin /bin; do
        case ":${PATH-}:" in *":$__part:"*) ;; *) PATH="${PATH:+$PATH:}$__part" ;; esac
    done
    export PATH
    unset __part
}
__inject() {
:
@INJECT@
}
if [ -d /.singularity.d/env ]; then
    for __file in /.singularity.d/env/*.sh; do
        [ -f "$__file" ] || continue
        case "$__file" in
        */90-environment.sh) [ -n "${PATH+x}" ] || __fix_path ;;
        */99-runtimevars.sh) continue ;;
        esac
        . "$__file"
        case "$__file" in
        */10-docker2singularity.sh | */10-docker.sh) __fix_path ;;
        */99-base.sh) __inject; __injected=1 ;;
        esac
    done
    [ -n "${__injected-}" ] || __inject
else
    if [ -f /environment ]; then . /environment; fi
    [ -n "${PATH+x}" ] || __fix_path
    __inject
fi
[ -n "${PATH+x}" ] || __fix_path
LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-/.singularity.d/libs}"
export LD_LIBRARY_PATH
@PATH@
unset -f __fix_path __inject
unset __file __injected
"""
# Arguments: how many NAME=VALUE follow, these, then the command. An image's own value wins over
# the host's, and one that it sets empty is removed.
_FORWARD = r"""
__left=$1
shift
while [ "$__left" -gt 0 ]; do
    __name=${1%%=*}
    eval "__set=\${$__name+x} __value=\${$__name-}"
    if [ -z "$__set" ]; then export "$1"; elif [ -z "$__value" ]; then unset "$__name"; fi
    shift
    __left=$((__left - 1))
done
unset __left __name __set __value
[ -n "${PS1:-}" ] || PS1="Apptainer> "
export PS1
if [ -z "${PROMPT_COMMAND:-}" ]; then
    PROMPT_COMMAND="PS1=\"$PS1\"; unset PROMPT_COMMAND"
    export PROMPT_COMMAND
fi
export APPTAINER_ENVIRONMENT="${APPTAINER_ENVIRONMENT:-/.singularity.d/env/91-environment.sh}"
export SINGULARITY_ENVIRONMENT="$APPTAINER_ENVIRONMENT"
__say() { printf '%s\n' "$1" >&2; }
"""
_EXEC = r"""
case "$1" in
*/*)
    [ -e "$1" ] || { __say "FATAL:   stat $1: no such file or directory"; exit 255; }
    [ -x "$1" ] && [ ! -d "$1" ] || { __say "FATAL:   permission denied: $1"; exit 255; } ;;
*)
    __found=
    __ifs=$IFS
    IFS=:
    for __dir in $PATH; do
        if [ -f "${__dir:-.}/$1" ] && [ -x "${__dir:-.}/$1" ]; then __found=1; break; fi
    done
    IFS=$__ifs
    [ -n "$__found" ] || {
        __say "FATAL:   \"$1\": executable file not found in \$PATH"
        exit 255
    }
    unset __found __ifs __dir ;;
esac
unset -f __say
exec "$@"
"""
_SHELL = r"""
unset -f __say
if [ -n "${SINGULARITY_SHELL:-}" ] && [ -x "${SINGULARITY_SHELL:-}" ]; then
    exec "$SINGULARITY_SHELL" "$@"
elif [ -x /bin/bash ]; then
    export SHELL=/bin/bash
    exec /bin/bash --norc "$@"
fi
export SHELL=/bin/sh
exec /bin/sh "$@"
"""
_RUN = r"""
if [ -n "${SINGULARITY_APPNAME:-}" ]; then
    [ ! -x "/scif/apps/$SINGULARITY_APPNAME/scif/runscript" ] ||
        exec "/scif/apps/$SINGULARITY_APPNAME/scif/runscript" "$@"
    __say "ERROR:   no runscript for contained app: $SINGULARITY_APPNAME"
    exit 1
fi
if [ -x /.singularity.d/runscript ]; then exec /.singularity.d/runscript "$@"; fi
if [ -x /apptainer ]; then exec /apptainer "$@"; fi
if [ -x /singularity ]; then exec /singularity "$@"; fi
@INFO@__say "INFO:    No runscript found in container, executing /bin/sh"
exec /bin/sh "$@"
"""
_TEST = r"""
if [ -n "${SINGULARITY_APPNAME:-}" ]; then
    [ ! -x "/scif/apps/$SINGULARITY_APPNAME/scif/test" ] ||
        exec "/scif/apps/$SINGULARITY_APPNAME/scif/test" "$@"
    __say "ERROR:   No tests for contained app: $SINGULARITY_APPNAME"
    exit 1
fi
if [ -x /.singularity.d/test ]; then exec /.singularity.d/test "$@"; fi
@INFO@__say "INFO:    No test script found in container, exiting"
exit 0
"""
_ACTIONS = {"exec": _EXEC, "shell": _SHELL, "run": _RUN, "test": _TEST}
_APP_CHECK = r"""
if [ -n "${SINGULARITY_APPNAME:-}" ] && [ ! -d "/scif/apps/$SINGULARITY_APPNAME/scif" ]; then
    __say "FATAL:   Could not locate the container application: $SINGULARITY_APPNAME"
    exit 1
fi
if [ -n "${SCIF_APPENV:-}" ]; then
    PATH="$SCIF_APPBIN:$PATH"
    LD_LIBRARY_PATH="$SCIF_APPLIB:$LD_LIBRARY_PATH"
    if [ -f "$SCIF_APPENV" ]; then . "$SCIF_APPENV"; fi
fi
"""


def script(action: ActionRequest, environment: Environment) -> str:
    """Return the text that the image's shell runs."""
    source = _SOURCE.replace(
        "@INJECT@", environ.injection(environment, evaluate=not action.no_eval)
    ).replace("@PATH@", environ.path_lines(environment))
    body = _ACTIONS[action.command].replace("@INFO@", "" if action.message_level >= 1 else ": || ")
    return source + _FORWARD + (_APP_CHECK if action.app else "") + body


def _command(action: ActionRequest) -> list[str]:
    return list(action.arguments)


def _entries(values: dict[str, str]) -> list[bytes]:
    return [os.fsencode(f"{name}={value}") for name, value in values.items()]


def _directories(action: ActionRequest, context: PrepareContext, prepared: Prepared) -> list[str]:
    home = prepared.user.home
    if action.cwd:
        return [action.cwd]
    if action.contain:
        return [home, "/"]
    return [path for path in (context.cwd, home, "/") if path]


def spec(
    action: ActionRequest,
    context: PrepareContext,
    prepared: Prepared,
    environment: Environment,
    binds: str,
) -> bytes:
    """Return the message for stage 2: all it needs to start the payload."""
    own = environ.own_variables(action, prepared.image.path, prepared.user.home, binds)
    forwarded = environment.forwarded
    shell_safe = {name: value for name, value in forwarded.items() if environ.is_name(name)}
    path = environment.path_edits.get("PATH", environ.DEFAULT_PATH)
    plain = {**forwarded, **own, **environment.injected, "PATH": path}
    plain.setdefault("LD_LIBRARY_PATH", "/.singularity.d/libs")
    return pack(
        {
            b"action": [action.command.encode()],
            b"arguments": [os.fsencode(word) for word in _command(action)],
            b"script": [os.fsencode(script(action, environment))],
            b"environment": _entries(own),
            b"forwarded": _entries(shell_safe),
            b"plain": _entries(plain),
            b"cwd": [os.fsencode(path) for path in _directories(action, context, prepared)],
            b"cwd_required": [b"yes"] if action.cwd else [],
            b"umask": [b"%d" % (0o022 if action.no_umask else context.facts.umask)],
            b"level": [b"%d" % action.message_level],
        }
    )
