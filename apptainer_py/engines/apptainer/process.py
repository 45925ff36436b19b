"""The payload as data: where, with which environment, by which script or program it starts."""

from __future__ import annotations

import os

from apptainer_py.base import log
from apptainer_py.engines.apptainer import environ
from apptainer_py.engines.apptainer.message import LIBRARY_MISSING

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from apptainer_py.engines.apptainer.environ import Environment
    from apptainer_py.engines.apptainer.prepare import Prepared
    from apptainer_py.model.request import ActionRequest
    from apptainer_py.runtime.contexts import PrepareContext

# The image's own files are sourced as Apptainer does it (facts §5.6.7), in the image's own shell:
# from an almost empty environment, in name order, PATH repaired before 90-environment and after
# docker's, our values after 99-base, and what the host forwards last, where it is still free.
#
# `. file` in a function keeps the file's `set --` away from the command; `command eval` keeps the
# shell alive where the file, or a value, is no shell language.  What only bash understands is
# read again by /bin/bash where the image has one.  No external program and no file beside the
# image's own is touched: through a fresh image server each costs milliseconds.
#
# A variable that is not set ends the start.  These shells say of no error which it was, so with
# `set -u`, or a `${x?}` in the file, one that is no error of the language counts for that.
# An error in a process that busybox's ash has forked below `command eval` never ends.  There (its
# `$'...'` is what dash has not) a file that may fork is read as it is: then an error ends the
# shell, whose last trap begins this text again behind that file.
# Arguments: this text, how many NAME=VALUE follow, these, then the command.
_SOURCE = r"""
unset PATH PS1 PS2 PS4 SHLVL OLDPWD TERM SHELL HOSTNAME HOSTTYPE MACHTYPE OSTYPE
#@DOCKER@
__pwd=${__pwd-$PWD}
__say() { printf '%s\n' "$1" >&2; }
__fix_path() {
    for __part in @DEFAULT_PATH@; do
        case ":${PATH-}:" in *":$__part:"*) ;; *) PATH="${PATH:+$PATH:}$__part" ;; esac
    done
    export PATH
}
__bash() {
    unset BASH_ENV __bash_only
    exec /bin/bash --norc -c 'eval "$1"' apptainer-py "$@"
}
if [ -n "${BASH_VERSION-}" ]; then
    declare() { builtin declare -g "$@"; }
    typeset() { builtin declare -g "$@"; }
    if [ -n "${__again-}" ]; then
        for __part in $(compgen -e); do
            case $__part in
            HOME | PWD | APPTAINER_* | SINGULARITY_* | SCIF_*) ;;
            *) unset "$__part" ;;
            esac
        done
    fi
elif [ -x /bin/bash ]; then
    __bash_only() { __again=1; }
    alias source=. '[[=__bash_only' declare=__bash_only typeset=__bash_only shopt=__bash_only
    alias let=__bash_only function=__bash_only mapfile=__bash_only readarray=__bash_only
fi
__source() {
    __done=
    case "$__file" in
    */10-docker2singularity.sh) if [ -n "${__docker-}" ]; then eval "$__docker"; __done=1; fi ;;
    esac
    if [ -n "$__done" ]; then :
    elif __forks; then
        alias exit='__exits=1 exit'
        trap '__ended "$@"' EXIT
        . "$__file"
        __done=1
        trap - EXIT
        unalias exit
    elif command eval '. "$__file"; __done=1'; then :
    fi
    __flags=$-
    set +aefu
}
__read() {
    __text=
    while IFS= read -r __part || [ -n "$__part" ]; do __text="$__text
$__part"; done <"$__file"
}
__forks() {
    [ -z "${BASH_VERSION-}" ] || return 1
    case $'\101' in A) ;; *) return 1 ;; esac
    __read
    case $__text in *'('* | *'`'* | *'|'* | *'&'*) ;; *) return 1 ;; esac
}
__ended() {
    __left=$?
    __flags=$-
    set +aefu
    trap - EXIT
    unalias exit
    case $__left,${__exits-},$__flags in 2,,*e*) exit 2 ;; 2,,*) ;; *) exit "$__left" ;; esac
    __resume=$__file
    eval "${1#*OSTYPE}"
    exit 255
}
__unset() {
    __read
    case $__text in *'${'*'?'*'}'*) __flags=u ;; esac
    case $__flags in *u*) ;; *) return 0 ;; esac
    if /bin/sh -n "$__file" 2>&-; then exit 1; fi
}
# Bash ends at a variable that is not set (`set -u`, `${x?}`) with 127, where other shells have a
# status below that.  What the file ends with by itself is left alone, but for `set -u`.
__status() {
    __done=$?
    case $__done,$- in
    127,*u*) __done=1 ;;
    127,*e*) ;;
    127,*) case ${__exits-},$BASH_COMMAND in
        1,* | ,exec\ *) ;;
        *) __done=1 ;;
        esac ;;
    esac
    builtin exit "$__done"
}
__exit() {
    set -- "${1-$?}"
    __exits=1
    builtin exit "$1"
}
if [ -n "${BASH_VERSION-}" ]; then
    trap __status EXIT
    case $SHELLOPTS in
    *posix*) alias exit=__exit ;;
    *) eval 'exit() { __exit "$@"; }' ;;
    esac
fi
__set() {
    command eval "$1=$2; export $1" ||
        @WARN@__say "WARNING: Skipping environment variable $1: $2 is no shell word"
}
__inject() {
    __injected=1
    [ -n "${PATH+x}" ] || __fix_path
@INJECT@
}
if [ -d /.singularity.d/env ]; then
    for __file in /.singularity.d/env/*.sh; do
        [ -f "$__file" ] || continue
        case "$__file,${__resume-}" in
        */99-runtimevars.sh,) continue ;;
        */90-environment.sh,) [ -n "${PATH+x}" ] || __fix_path ;;
        "${__resume-},$__file") ;;
        *,?*) continue ;;
        esac
        [ -n "${__resume-}" ] || __source
        __resume=
        if [ -z "$__done$__again" ]; then
            if [ -z "${BASH_VERSION-}" ] && [ -x /bin/bash ]; then
                @INFO@__say "INFO:    Reading $__file with /bin/bash"
                __again=1
            else
                [ -n "${BASH_VERSION-}" ] || __unset
                @WARN@__say "WARNING: Skipping the rest of $__file"
            fi
        fi
        if [ -n "$__again" ] && [ -z "${BASH_VERSION-}" ]; then
            unalias -a
            export __again
            __bash "$@"
        fi
        case "$__file" in
        */10-docker2singularity.sh | */10-docker.sh) __fix_path ;;
        */99-base.sh) __inject ;;
        esac
    done
elif [ -f /environment ]; then
    __file=/environment
    [ -n "${__resume-}" ] || __source
    [ -n "$__done${BASH_VERSION-}" ] || __unset
    __fix_path
fi
unalias -a
trap - EXIT
unset __again __done __docker __exits __flags __resume __text
[ -n "${__injected-}" ] || __inject
@PATH@
[ "$PWD" = "$__pwd" ] || { cd "$__pwd" && unset OLDPWD; } || :
"""
# An image's own value wins over the host's, and one that it sets empty is removed.  A shell that
# minds what it is given, as bash minds locales, does so in silence.
_FORWARD = r"""
__left=$2
shift 2
while [ "$__left" -gt 0 ]; do
    __name=${1%%=*}
    eval "__set=\${$__name+x} __value=\${$__name-}"
    if [ -z "$__set" ]; then export "$1"; elif [ -z "$__value" ]; then unset "$__name"; fi
    shift
    __left=$((__left - 1))
done 2>&-
[ -n "${PS1:-}" ] || PS1="Apptainer> "
export PS1
if [ -z "${PROMPT_COMMAND:-}" ]; then
    PROMPT_COMMAND="PS1=\"${PS1}\"; unset PROMPT_COMMAND"
else
    PROMPT_COMMAND="$PROMPT_COMMAND; PROMPT_COMMAND=\"\${PROMPT_COMMAND%%; PROMPT_COMMAND=*}\""
    PROMPT_COMMAND="$PROMPT_COMMAND; PS1=\"${PS1}\""
fi
export PROMPT_COMMAND
export APPTAINER_ENVIRONMENT="${APPTAINER_ENVIRONMENT:-/.singularity.d/env/91-environment.sh}"
export SINGULARITY_ENVIRONMENT="$APPTAINER_ENVIRONMENT"
"""
_EXEC = r"""
__found=
case "$1" in
*/*)
    case "$1" in
    /*) __found=$1 ;;
    *) __found=$PWD/${1#./} ;;
    esac
    [ -e "$__found" ] || {
        __say "FATAL:   stat $__found: no such file or directory"
        exit 255
    }
    [ ! -d "$__found" ] || { __say "FATAL:   is a directory"; exit 255; }
    [ -x "$__found" ] || { __say "FATAL:   permission denied"; exit 255; } ;;
*)
    IFS=:
    set -f
    for __part in $PATH; do
        __part=${__part:-.}/$1
        if [ -x "$__part" ] && [ ! -d "$__part" ]; then __found=$__part; break; fi
    done
    unset IFS
    [ -n "$__found" ] || {
        __say "FATAL:   \"$1\": executable file not found in \$PATH"
        exit 255
    } ;;
esac
shift
__become "$__found" "$@"
"""
_SHELL = r"""
if [ -n "${SINGULARITY_SHELL:-}" ]; then
    if [ -x "$SINGULARITY_SHELL" ]; then __become "$SINGULARITY_SHELL" "$@"; fi
    @WARN@__say "WARNING: $SINGULARITY_SHELL is no program of the container: another shell starts"
fi
if [ -x /bin/bash ]; then
    export SHELL=/bin/bash
    __become /bin/bash --norc "$@"
fi
export SHELL=/bin/sh
__become /bin/sh "$@"
"""
_RUN = r"""
if [ -n "${SINGULARITY_APPNAME:-}" ]; then
    if [ -x "/scif/apps/$SINGULARITY_APPNAME/scif/runscript" ]; then
        __become "/scif/apps/$SINGULARITY_APPNAME/scif/runscript" "$@"
    fi
    __say "ERROR:   no runscript for contained app: $SINGULARITY_APPNAME"
    exit 1
fi
if [ -x /.singularity.d/runscript ]; then __become /.singularity.d/runscript "$@"; fi
if [ -x /apptainer ]; then __become /apptainer "$@"; fi
if [ -x /singularity ]; then __become /singularity "$@"; fi
@INFO@__say "INFO:    No runscript found in container, executing /bin/sh"
__become /bin/sh "$@"
"""
_TEST = r"""
if [ -n "${SINGULARITY_APPNAME:-}" ]; then
    if [ -x "/scif/apps/$SINGULARITY_APPNAME/scif/test" ]; then
        __become "/scif/apps/$SINGULARITY_APPNAME/scif/test" "$@"
    fi
    __say "ERROR:   No tests for contained app: $SINGULARITY_APPNAME"
    exit 1
fi
if [ -x /.singularity.d/test ]; then __become /.singularity.d/test "$@"; fi
@INFO@__say "INFO:    No test script found in container, exiting"
exit 0
"""
# A failed exec ends every one of these shells, and only the trap still speaks.
_BECOME = r"""
if [ -n "${BASH_VERSION-}" ]; then
    shopt -s execfail
    [ -z "${SHLVL-}" ] || SHLVL=$((SHLVL + 1))
fi
__become() {
    __found=$1
    [ ! -d "$1" ] || { __say "FATAL:   $1 is a directory"; exit 255; }
@PREFIX@    trap '__say "FATAL:   exec $__found failed: @FAILED@"; exit 255' EXIT
@ODD@
    exec "$@"
    exit 255
}
"""
# Names that no shell can hold, as those of bash's exported functions, come back by env(1).
_ODD = """\
    for __part in /usr/bin/env /bin/env -; do
        case $__part:$1 in
        -:*) @INFO@__say "INFO:    Without env(1) in the image no shell can forward @NAMES@" ;;
        *=*) ;;
        *) [ ! -x "$__part" ] || exec "$__part" -- @PAIRS@ "$@" ;;
        esac
    done"""
_START = r"""
if [ -n "${SINGULARITY_APPNAME:-}" ]; then
    if [ -x "/scif/apps/$SINGULARITY_APPNAME/scif/startscript" ]; then
        __become "/scif/apps/$SINGULARITY_APPNAME/scif/startscript" "$@"
    fi
    __say "ERROR:   No startscript for contained app: $SINGULARITY_APPNAME"
    exit 1
fi
if [ -x /.singularity.d/startscript ]; then __become /.singularity.d/startscript "$@"; fi
@INFO@__say "INFO:    No instance start script found in container"
exit 0
"""
_ACTIONS = {"exec": _EXEC, "shell": _SHELL, "run": _RUN, "start": _START, "test": _TEST}
_NOTHING = ": || "


def script(action: ActionRequest, environment: Environment, prefix: Sequence[str] = ()) -> str:
    """Return the text that the image's shell runs; `prefix` stands before the program's name."""
    words = " ".join([environ.quoted(word) for word in prefix])
    become = _BECOME.replace("@PREFIX@", f'    set -- {words} "$@"\n' if prefix else "")
    body = _FORWARD + become + _ACTIONS[action.command]
    level = action.message_level
    text = (
        (_SOURCE + body)
        .replace("@INFO@", "" if level >= log.INFO else _NOTHING)
        .replace("@WARN@", "" if level >= log.WARN else _NOTHING)
        .replace("@FAILED@", LIBRARY_MISSING)
        .replace("@DEFAULT_PATH@", environ.DEFAULT_PATH.replace(":", " "))
    )
    # The caller's own text comes last: nothing in it is a mark of ours any more.
    before, _, rest = text.partition("@INJECT@")
    between, _, rest = rest.partition("@PATH@")
    main, _, after = rest.partition("@ODD@")
    values = environ.injection(environment, evaluate=not action.no_eval)
    paths = environ.path_lines(environment, evaluate=not action.no_eval)
    odd = _forward_odd(odd_names(environment), told=level >= log.INFO)
    return "".join((before, values, between, paths, main, odd, after))


def odd_names(environment: Environment) -> dict[str, str]:
    """Return what is forwarded under a name that no shell can hold."""
    return {
        name: value
        for name, value in environment.forwarded.items()
        if not environ.is_name(name) and not environ.is_of_the_shell(name)
    }


def _forward_odd(odd: dict[str, str], *, told: bool) -> str:
    if not odd:
        return ""
    pairs = " ".join([environ.quoted(f"{name}={value}") for name, value in odd.items()])
    names = environ.quoted(", ".join(odd)).replace('"', "_").replace("`", "_").replace("$", "_")
    before, _, rest = _ODD.replace("@INFO@", "" if told else _NOTHING).partition("@NAMES@")
    between, _, after = rest.partition("@PAIRS@")
    return "".join((before, names, between, pairs, after))


def _command(action: ActionRequest) -> tuple[str, ...]:
    if action.command == "shell" and action.arguments:
        log.warning("Parameters to shell command are ignored")
        return ()
    return action.arguments


def _entries(values: dict[str, str]) -> list[bytes]:
    return [os.fsencode(f"{name}={value}") for name, value in values.items()]


def _directories(action: ActionRequest, context: PrepareContext, home: str) -> list[str]:
    if action.cwd:
        return [action.cwd]
    if action.contain:
        return [home, "/"]
    if not context.cwd:
        log.warning(
            f"the current directory has no path (was it removed?); using '{home or '/'}' instead"
        )
    return [path for path in (context.cwd, home, "/") if path]


def _has_console(prepared: Prepared) -> bool:
    return any(name == "dev/console" for _, name, _, _ in prepared.staged)


def _prefix(prepared: Prepared) -> list[str]:
    return prepared.fakeroot.prefix if prepared.fakeroot else []


def spec(
    action: ActionRequest,
    context: PrepareContext,
    prepared: Prepared,
    environment: Environment,
    binds: str,
) -> dict[bytes, list[bytes]]:
    """Return all that is needed to start the payload of a container that is made for it."""
    image, home = prepared.image.path, prepared.user.home
    found = lists(action, context, image, home, environment, binds, _prefix(prepared))
    if _has_console(prepared):
        found[b"console"] = [b"yes"]
    found[b"filter"] = prepared.filter
    found[b"label"] = prepared.label
    found[b"fuses"] = prepared.fuses.message() if prepared.fuses else []
    return found


def lists(  # noqa: PLR0913 one thing each
    action: ActionRequest,
    context: PrepareContext,
    image: str,
    home: str,
    environment: Environment,
    binds: str,
    prefix: list[str] | None = None,
) -> dict[bytes, list[bytes]]:
    """Return all that is needed to start the payload, by name."""
    own = environ.own_variables(action, image, home, binds)
    early = {name: own.pop(name) for name in environ.EARLY if name in own}
    late = {name: value for name, value in environment.forwarded.items() if environ.is_name(name)}
    late.update(own)
    early.update(
        (name, value) for name, value in environment.forwarded.items() if name in environ.OF_BASH
    )
    path = environment.path_edits.get("PATH", environ.DEFAULT_PATH)
    plain = {
        **environment.forwarded,
        **own,
        **early,
        **environment.fixed,
        **environment.injected,
        "PATH": path,
    }
    plain.setdefault("LD_LIBRARY_PATH", "/.singularity.d/libs")
    evaluate = not action.no_eval
    return {
        b"action": [b"boot" if action.boot else action.command.encode()],
        b"arguments": [os.fsencode(word) for word in _command(action)],
        b"script": [os.fsencode(script(action, environment, prefix or []))],
        b"values": [os.fsencode(environ.injection(environment, evaluate=evaluate))],
        b"paths": [os.fsencode(environ.path_lines(environment, evaluate=evaluate))],
        b"app": [os.fsencode(action.app)] if action.app else [],
        b"environment": _entries(early),
        b"forwarded": _entries(late),
        b"plain": _entries(plain),
        b"odd": _entries(odd_names(environment)),
        b"cwd": [os.fsencode(path) for path in _directories(action, context, home)],
        b"prefix": [os.fsencode(word) for word in prefix or []],
        b"cwd_required": [b"yes"] if action.cwd else [],
        b"umask": [b"%d" % (0o022 if action.no_umask else context.facts.umask)],
        b"console": [],
        b"filter": [],
        b"label": [],
        b"fuses": [],
        b"level": [b"%d" % action.message_level],
    }
