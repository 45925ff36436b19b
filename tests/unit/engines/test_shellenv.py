from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from binascii import crc32
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from apptainer_py.engines.apptainer import environ, process, shellenv
from apptainer_py.engines.apptainer.shellenv import NotSimple, environment, run
from apptainer_py.model.request import ActionRequest
from tests import images

SHELLS = {
    "dash": ["dash"],
    "bash": ["bash"],
    "bash as sh": ["bash", "--posix"],
    "busybox": ["busybox", "sh"],
}
GIVEN = {"HOME": "/h o", "FOO": "from the host", "GLOB": "* ?[a]", "EMPTY": "", "WORD": "w"}
# What a shell adds to a child's environment by itself.
NOISE = {"_", "SHLVL", "OLDPWD"}

ACCEPTED = r"""
test -r ${NEVER+"x"} && export A=1
export TERM
A=$TERM
A=$HOSTNAME
A=1
A=1; B=2
A=1 B=2 C=$A
export A=1 B="$A"
export A
export A=
A= B=
export A; A=1
A=1; export A; A=2
export A; unset A; A=1
export A=1; unset A; A=2
unset A B FOO
unset FOO; FOO=1
unset NEVER; export A="[$NEVER]"
export A='x y' B="x  y" C=x\ y
export A=a"b c"'$d'\"e
export A=""''
export A="$FOO"
export A="$FOO/bin:$EMPTY:${WORD}"
export A=$WORD
export A=$WORD/$EMPTY$NEVER
A=$GLOB; export A
A=$FOO$GLOB; export A
A=*; export A
A=[a]?; export A
export A="*" B='?' C=\*
export A=a,b:c@d%e^f+g-h_i.j/k]
export A=a=b=c
export A=a#b
A=1 # B=2
A=1;# B=2
# export A=1
A=a!b; export A
export A="a!b"
export A="$" B="a$ b" C="5$/x"
A=a$/b; export A
export A="\$FOO \"q\" \\ \`x\` \a \' \*"
export A=\a\$\"\'\\
export A="it's"
export A='say "hi"'
export A="tab	in"
export A="é€" B='ü'
export A="${FOO}" B="${NEVER}"
export A="${FOO:-no}" B="${NEVER:-yes}" C="${EMPTY:-yes}"
export A="${FOO-no}" B="${NEVER-yes}" C="${EMPTY-yes}"
export A="${FOO:+yes}" B="${NEVER:+no}" C="${EMPTY:+no}"
export A="${FOO+yes}" B="${NEVER+no}" C="${EMPTY+yes}"
export A="${NEVER:=set}"
: "${NEVER:=set it}"; export NEVER
: ${NEVER:=set it}; export NEVER
: ${EMPTY:=set} ${WORD:=no}
: "${EMPTY=no}"
export A="${FOO:?not needed}"
export PATH="/usr/local/bin:/usr/bin"
export A="${A:-"value"}"
export A="${A:-"a b  c"}"
export A="${A:-"* ? ~ # ; | & < > ( )"}"
export A="${A:-"it's"}"
export A="${A:-"a\"b\\c\$d\`e"}"
export A="${A:-"a\\\"b"}"
export GPG_KEY="${GPG_KEY:-"ABC"}"
export FOO="${FOO:-"ABC"}"
export A="${A:-""}"
export A="${A:-}"
export A="${A:-$FOO}"
export A="${A:-"$FOO x"}"
export A="${A:-${B:-${WORD}}}"
export A="${A:-${B:-x y}}"
export A="${A:-a b;c&d|e<f>g*h?i[j]k}"
export A="${FOO:+$FOO:}x" B="${NEVER:+$NEVER:}x"
export A="${A:-a\"b\$c\\d}"
A=${A:-a b}; export A
A=${A:-'a b'}; export A
A=${A:-"a  b"c}; export A
A=${A:-a\ b}; export A
A=${A:-#a}; export A
A=${A:-*}; export A
A=${GLOB:-x}; export A
export A=${WORD:-x}${NEVER:+y}
export PATH="/x${PATH:+:$PATH}"
export LD_LIBRARY_PATH="/x:$LD_LIBRARY_PATH"
: ; A=1; export A
true && export A=1
false && export A=1
true || export A=1
false || export A=1
false || true && export A=1
true || false && export A=1
false && true || export A=1
! true || export A=1
! false && export A=1
A=1 && export A
! A=1 || export A
if true; then export A=1; fi
if false; then export A=1; fi
if false; then :; else export A=1; fi
if false; then :; elif true; then export A=1; else export A=2; fi
if false; then :; elif false; then export A=1; else export A=2; fi
if true; then :; elif true; then export A=1; else export A=2; fi
if true; then if false; then export A=1; else export A=2; fi; fi
if ! true; then export A=1; else export A=2; fi
if false; then :; fi && export A=1
if true; then false; fi || export A=1
if true; then false; fi && export A=1
if true; false; then export A=1; fi
if true && false || true; then export A=1; fi
if [ -z "$NEVER" ] ; then A=1 ; export A ; fi
if [ -n "$FOO" ] && [ -d "/" ]; then export A=1; fi
if test -n "$FOO"; then export A=1; fi
[ -n "$FOO" ] && export A=1
[ -n "$EMPTY" ] && export A=1
[ -z "$NEVER" ] && export A=1
[ -z "${NEVER:-}" ] || export A=1
[ -n $NEVER ] && export A=1
[ -z $NEVER ] && export A=1
[ $WORD = w ] && export A=1
[ "$WORD" != w ] || export A=1
[ "$WORD" = "w" ] && export A=1
[ ! "$WORD" = w ] || export A=1
[ x"$EMPTY" = x ] && export A=1
[ "x$FOO" != "x" ] && export A=1
[ "$FOO" ] && export A=1
[ ! "$FOO" ] || export A=1
[ "" ] || export A=1
[ ] || export A=1
test || export A=1
[ -n ] && export A=1
[ -z ] && export A=1
[ ! -n "$EMPTY" ] && export A=1
[ -d dir ] && export A=1
[ -d file ] || export A=1
[ -f file ] && export A=1
[ -f dir ] || export A=1
[ -e none ] || export A=1
[ -e file ] && export A=1
[ -s file ] && export A=1
[ -s empty ] || export A=1
[ -x tool ] && export A=1
[ -x dir ] && export A=1
[ -r file ] && export A=1
[ -L link ] && export A=1
[ -h link ] && export A=1
[ -d link ] && export A=1
[ -L dir ] || export A=1
[ -d "" ] || export A=1
[ -f $NEVER ] && export A=1
[ ! -f none ] && export A=1
[ ! -d dir ] || export A=1
[ -d "dir/" ] && export A=1
if [ -f none ]; then . ./none; fi; export A=1
if false; then echo hi; exit 1; fi
if false; then echo "$@" $1 $? $# $$ > none 2>&1; fi
if false; then cd /tmp; eval "$A"; set -e; . x; source y; exec z; fi
if false; then A=~/x; A=${B%%:*} C="${B#*/}" D=$HOME/*.so; fi
if false; then [ 1 -eq 2 ] && [ a == b -o c ]; fi
if false; then export A=$FOO; unset -f x; trap - EXIT; fi
if false; then "fi"; 'then' x; echo fi; fi; export A=1
if false; then "$FOO" x; $FOO; fi; export A=1
export LC_ALL=C.UTF-8 LANG=C A="é"
export TERM=xterm SHELL=/bin/x HOSTNAME=h
export PS1="x> "
PS1="x> "; export PS1
export BASH_ENV=/x
export  A=1   B=2	C=3
if false; then : 'fi'; : "fi"; : \fi; fi; export A=1
if false; then if x; then y; elif z; then :; else :; fi; else export A=1; fi
false && echo hi && exit 1; export A=1
true || exit 1; export A=1
"""
ACCEPTED_LONG = r"""
if false; then : # then fi
fi; export A=1
%
export A=1 \
  B=2
%
export A=1 \
# B=2
%
export A=x\
y
%
A=1\
#b; export A
%
export A="x\
y"
%
export A='x\
y'
%
export A='x
y'
%
export A="x

y"
%
export A="${A:-"x
y"}"
%
true &&
export A=1
%
true ||

# comment
export A=1
%
if
true
then
export A=1
fi
%
if true # why
then export A=1; fi
%
if [ -n "$NEVER" ]; then
	echo "a # b" # c "d
fi
export A=1
"""

# Each of these is for the shell: shells differ, or it is more than the evaluator knows.
REFUSED = r"""
A="${NEVER:-"$FOO"x}"
A="${NEVER:-x"$FOO"}"
test -r ${NEVER-""}
if false; then x[ a ]; fi
export A[ 1 ]=2
export A=${NEVER:-'*'}
export A=${NEVER:-"a b"}
A=$(id)
A=`id`
A="$(id)"
A="`id`"
A=$((1+1))
A=(1 2)
A+=1
A[0]=1
A=~
A=~/x
A=/a:~/x
export A=~/x
export A="${A:-~/x}"
export A={a,b}
A={a,b}
export A=$FOO
export A=$GLOB
export A=x*
export A=${NEVER:-a b}
export A=$'a'
A=$"a"
export $WORD=1
export "A=1"
export -p
export -n A
export
unset
unset -v A
unset -f A
unset PATH
unset PS1
A=1 :
A=1 export B=1
A=$1
A=$@
A=$?
A=$$
A=${#FOO}
A=${FOO%x}
A=${FOO#x}
A=${FOO/a/b}
A=${FOO:0:1}
A=${!FOO}
A=${FOO^^}
A=${1:-x}
A=${}
A=${FOO:}
A=${NEVER?}
A="${A:-"a}b"}"
A="${A:-"a\nb"}"
A="${A:-'a'}"
A="${A:-it's}"
A="${A:-{}"
A="x
A='x
A=${x
A="${x"
A=|
A=1 | B=2
A=1 &
A=1 & B=2
A=1;;
;
; A=1
A=1 ; ;
&& A=1
A=1 &&
A=1 || || B=2
(A=1)
{ A=1; }
f() { A=1; }
function f { A=1; }
if true; then A=1
if true; A=1; fi
if; then A=1; fi
if true; then fi
if true; then A=1; else fi
if true; then A=1; fi fi
if true; then A=1; fi B=2
if true; then A=1; fi; fi
if true; then A=1; else A=2; else A=3; fi
if true; then A=1; else A=2; elif true; then A=3; fi
then
fi
else
! ! true
!
case a in a) A=1 ;; esac
for A in 1; do :; done
while false; do :; done
if false; then case a in a) A=1 ;; esac; fi
if false; then for A in 1; do :; done; fi
if false; then A=$(id); fi
if false; then A=`id`; fi
if false; then cat <<E; fi
if false; then (A=1); fi
if false; then f() { :; }; fi
if false; then { A=1; }; fi
if false; then [[ a ]]; fi
if false; then time x; fi
if false; then A=(1); fi
if false; then A=1 fi
if false; then x & fi
A=1 > x
> x
A=1 2>&1
: > x
echo hi
cd /
. ./x
source x
eval A=1
set -e
set -u
set -- x
trap : EXIT
exec x
exit
exit 0
return
readonly A=1
local A=1
declare A=1
typeset A=1
alias a=b
umask 022
ulimit -c 0
shift
break
printf x
read A
command A
builtin export A=1
FOO
$FOO
"export" A=1
\export A=1
[ a == a ]
[ 1 -eq 1 ]
[ a -a b ]
[ a = a -o b ]
[ a = a
[ ! ! a ]
[ ( a ) ]
[ -t 0 ]
[ -v FOO ]
[ a < b ]
[ $FOO = x ]
[ $GLOB ]
[ "$FOO" = * ]
[ -n "$FOO" ]]
[[ -n $FOO ]]
[-n a]
[ -e /dev/fd/0 ]
[ -e /proc/self/fd/9 ]
test -n a ]
IFS=:
export IFS=x
UID=1
export UID=1
A=$UID
A=$RANDOM
A=$LINENO
A=$IFS
A=$OPTIND
A=$PPID
A=$BASH_VERSION
A=$_
PWD=/
unset PWD
export PWD
A=$PWD
unset TERM
SHLVL=1
POSIXLY_CORRECT=1
A=$__file
__done=1
__set A 1
é=1
A=é
"""
REFUSED_LONG = r"""
export A="$EMPTY\
x"
%
if false; then cat <<E
fi
E
fi
%
if false; then f\
i; fi
%
ex\
port A=1
%
A\
=1
%
! true
|| A=1
%
A=${NEVER-
x}
%
export A="${A:-x
y}"
"""
TEXTS_ACCEPTED = ACCEPTED.strip("\n").split("\n") + ACCEPTED_LONG.strip("\n").split("\n%\n")
TEXTS_REFUSED = REFUSED.strip("\n").split("\n") + REFUSED_LONG.strip("\n").split("\n%\n")
TEXTS_ACCEPTED.append("\t  A=1\t ;  export A  ")
TEXTS_REFUSED += ["A=1\r", "A=\r1", "A=1\0", "A='\1'", "A='\x7f'", "\x0cA=1", "A=\udcff"]
BYTES = ["export A='\udcff\udc81\udc88'", 'export A="\udc82$FOO\u0101\u4e2d"', "export A='\r\n'"]

# As they are in real images: Apptainer's own without their comments, and what it makes of Docker's.
DOCKER = """\
#!/bin/sh
export PATH="/usr/local/cuda/bin:/usr/local/bin:/usr/bin:/bin"
export LANG="${LANG:-"C.UTF-8"}"
export GPG_KEY="${GPG_KEY:-"A035C8C19219BA821ECEA86B64E628F8D684696D"}"
export PYTHON_VERSION="${PYTHON_VERSION:-"3.11.2"}"
export NV_REQUIRE="${NV_REQUIRE:-"cuda>=12.0 brand=tesla,driver>=470,driver<471"}"
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-"/usr/local/nvidia/lib:/usr/local/nvidia/lib64"}"
export NO_VALUE="${NO_VALUE:-}"
"""
APPS = """\
#!/bin/sh
if test -n "${SINGULARITY_APPNAME:-}"; then

    # The active app should be exported
    export SINGULARITY_APPNAME

    if test -d "/scif/apps/${SINGULARITY_APPNAME:-}/"; then
        SCIF_APPS="/scif/apps"
        SCIF_APPROOT="/scif/apps/${SINGULARITY_APPNAME:-}"
        export SCIF_APPROOT SCIF_APPS
        PATH="/scif/apps/${SINGULARITY_APPNAME:-}:/scif/apps/singularity:$PATH"

        if test -d "/scif/apps/${SINGULARITY_APPNAME:-}/bin"; then
            PATH="/scif/apps/${SINGULARITY_APPNAME:-}/bin:$PATH"
        elif test -d "/scif/apps/singularity/bin"; then
            PATH="/scif/apps/singularity/bin:$PATH"
        fi

        if [ -f "/scif/apps/${SINGULARITY_APPNAME:-}/scif/env/01-base.sh" ]; then
            . "/scif/apps/${SINGULARITY_APPNAME:-}/scif/env/01-base.sh"
\t\telif [ -f "/scif/apps/singularity/scif/env/01-base.sh" ]; then
            . "/scif/apps/singularity/scif/env/01-base.sh" "$@"
        fi

        export PATH
    else
        echo "Could not locate the container application: ${SINGULARITY_APPNAME}"
        exit 1
    fi
fi
"""
BASE = """\
#!/bin/sh
if [ -z "${LD_LIBRARY_PATH:-}" ]; then
    LD_LIBRARY_PATH="/.singularity.d/libs"
else
    LD_LIBRARY_PATH="$LD_LIBRARY_PATH:/.singularity.d/libs"
fi

if [ -z "${PS1:-}" ]; then
    PS1="Apptainer> "
fi
export LD_LIBRARY_PATH PS1
"""
RUNTIME = """\
if [ -n "${SING_USER_DEFINED_PATH:-}" ]; then
\tPATH="${SING_USER_DEFINED_PATH}"
fi
unset SING_USER_DEFINED_PREPEND_PATH \\
\t  SING_USER_DEFINED_PATH
export PATH
"""

Outcome = dict[str, str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one thing of each kind that a file test tells apart."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "dir").mkdir()
    (folder / "file").write_text("x")
    (folder / "empty").touch()
    (folder / "tool").touch(mode=0o755)
    (folder / "link").symlink_to("dir")
    return folder


def finder(folder: Path) -> Callable[[str, str], bool]:
    """Answer file tests as stage 2 does, but from a folder."""

    def exists(kind: str, path: str) -> bool:
        at = folder / path
        answers: dict[str, Callable[[], bool]] = {
            "d": at.is_dir,
            "f": at.is_file,
            "e": at.exists,
            "s": lambda: at.exists() and at.stat().st_size > 0,
            "r": lambda: os.access(at, os.R_OK),
            "x": lambda: os.access(at, os.X_OK),
            "L": at.is_symlink,
            "h": at.is_symlink,
        }
        return answers[kind]()

    return exists


def evaluated(text: str, folder: Path) -> Outcome | None:
    """Return what is exported after the text, or None where it is left to a shell."""
    variables, exported = dict(GIVEN), set(GIVEN)
    try:
        run(text, variables, exported, finder(folder))
    except NotSimple:
        assert variables == GIVEN
        assert exported == set(GIVEN)
        return None
    return {name: value for name, value in variables.items() if name in exported}


def parsed(output: bytes) -> Outcome:
    """Return the variables in what `env -0` wrote."""
    pairs = [entry.partition(b"=") for entry in output.split(b"\0") if entry]
    found = {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}
    return {name: value for name, value in found.items() if name not in NOISE}


def script_of(action: ActionRequest, host: Mapping[str, str] | None = None) -> str:
    """Return the script that the image's shell would run."""
    return process.script(action, environ.collect(action, host or {})).strip()


def shell_outcomes(shell: Sequence[str], texts: Sequence[str], folder: Path) -> list[Outcome]:
    """Return what each text exports in that shell; one that it does not finish has no `DONE`."""
    sources = folder / "texts"
    sources.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (sources / str(number)).write_bytes(os.fsencode(text))
    script = f"""
        {script_of(ActionRequest(command="exec", image="")).splitlines()[0]}
        number=0
        while [ "$number" -lt {len(texts)} ]; do
            (
                f() {{ command eval '. ./texts/"$number"; export DONE=1'; }}
                f
                exec /usr/bin/env -0
            )
            printf '\\0\\0'
            number=$((number + 1))
        done 2>&-
    """
    program = shutil.which(shell[0])
    assert program, f"{shell[0]} is not installed"
    done = subprocess.run(
        [program, *shell[1:], "-c", script],
        cwd=folder,
        env=GIVEN,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        timeout=120,
    )
    found = [parsed(part) for part in done.stdout.split(b"\0\0\0")]
    assert len(found) == len(texts) + 1
    return found[:-1]


def assert_agreement(texts: Sequence[str], folder: Path) -> int:
    """Compare with every shell what the evaluator answers; return how often it did."""
    answers = {text: answer for text in texts if (answer := evaluated(text, folder)) is not None}
    for name, shell in SHELLS.items():
        outcomes = shell_outcomes(shell, list(answers), folder)
        for (text, answer), outcome in zip(answers.items(), outcomes, strict=True):
            outcome.pop("PWD")
            if "PATH" not in answer:  # busybox exports it, whatever it is told
                outcome.pop("PATH", None)
            assert (name, text, outcome) == (name, text, {**answer, "DONE": "1"})
    return len(answers)


def test_every_shell_agrees_on_what_is_accepted(place: Path) -> None:
    texts = TEXTS_ACCEPTED + BYTES
    assert [text for text in texts if evaluated(text, place) is None] == []
    assert assert_agreement(texts, place) == len(set(texts)) > 150


def test_every_shell_agrees_on_all_accepted_texts_together(place: Path) -> None:
    generator = random.Random(3)
    short = [text for text in TEXTS_ACCEPTED if len(text) < 400]
    texts = ["\n".join(generator.sample(short, 12)) for _ in range(100)]
    assert assert_agreement(texts, place) > 50


@pytest.mark.parametrize("text", TEXTS_REFUSED)
def test_what_is_not_simple_is_left_to_the_shell(text: str, place: Path) -> None:
    assert evaluated(text, place) is None
    assert evaluated(f"A=1\n{text}\n", place) is None


NAMES = ("A", "B", "FOO", "GLOB", "EMPTY", "WORD", "NEVER", "PATH", "a_1")
LITERALS = ("x", "/usr/bin:/bin", "a=b", "1", "-", "-n", "=", "!", "]", ".", "#", "%", "fi", "+")
TRICKY = (
    *" \t\n;&|<>()'\"\\$`{}[]*?!#~=:-+%/@^,.",
    *"AFx1é",
    *("\\\n", "${", "$FOO", '"', '"', "'", "if ", "then ", "else ", "fi", "; ", "&& ", "|| "),
    *("export ", "unset ", "[ ", " ]", "A=", "FOO:-", "# ", "true", "false;", ": ", "! ", "\\\\"),
    *("$GLOB", "$EMPTY", '"$FOO"', "}", '"${A:-"', '"}"', "-z ", "\r", "\udc81", "esac", "test "),
)


class Programs:
    """Writes programs of the accepted kind, with things in them that shells treat with care."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def one(self, *choices: Callable[[], str]) -> str:
        return self.random.choice(choices)()

    def name(self) -> str:
        return self.random.choice(NAMES)

    def literal(self) -> str:
        return self.random.choice(LITERALS)

    def junk(self) -> str:
        return "".join(self.random.choices(TRICKY, k=self.random.randrange(4)))

    def braces(self, word: Callable[[], str]) -> str:
        operator = self.random.choice((":-", "-", ":+", "+", ":=", "=", ":?", "%"))
        return f"${{{self.name()}{operator}{word()}}}"

    def expansion(self) -> str:
        return self.one(
            lambda: f"${self.name()}", lambda: f"${{{self.name()}}}", lambda: self.braces(self.word)
        )

    def quoted(self) -> str:
        kinds: tuple[Callable[[], str], ...] = (
            lambda: f"${self.name()}",
            lambda: f"${{{self.name()}}}",
            lambda: self.braces(lambda: f'"{self.literal()} {self.literal()}"'),
            lambda: self.braces(self.literal),
            lambda: self.braces(self.junk),
            self.literal,
            self.junk,
            lambda: self.random.choice((" ", "\\$", '\\"', "\\\\", "\\a", "'", "~", "*", "}")),
        )
        inner = self.random.choices(kinds, k=self.random.randrange(4))
        return '"' + "".join(part() for part in inner) + '"'

    def word(self) -> str:
        parts = self.random.choices(
            (
                self.literal,
                self.quoted,
                self.quoted,
                self.expansion,
                lambda: f"'{self.literal()} $A'",
                lambda: self.random.choice(
                    ("\\ ", "\\$", "\\*", "*", "?", "\\\n", "", self.junk())
                ),
            ),
            k=self.random.randrange(1, 4),
        )
        return "".join(part() for part in parts)

    def assignment(self) -> str:
        return f"{self.name()}={self.word()}"

    def condition(self) -> str:
        compare = self.random.choice(("=", "!=", "=="))
        kind = self.random.choice("zndfexrsL")
        body = self.one(
            lambda: f"-{kind} {self.word()}",
            lambda: f'-{kind} "${self.name()}"',
            lambda: f"-{kind} {self.random.choice(('dir', 'file', 'empty', 'tool', 'link', '/'))}",
            lambda: f"{self.quoted()} {compare} {self.quoted()}",
            lambda: f"{self.word()} {compare} {self.word()}",
            self.word,
        )
        no = self.random.choice(("", "", "! "))
        return self.random.choice((f"[ {no}{body} ]", f"test {no}{body}"))

    def command(self, depth: int = 0) -> str:
        simple = (
            self.assignment,
            lambda: f"{self.assignment()} {self.assignment()}",
            lambda: f"export {self.name()}={self.quoted()}",
            lambda: f"export {self.assignment()} {self.name()} {self.assignment()}",
            lambda: f"export {self.name()} {self.name()}",
            lambda: f"unset {self.name()}",
            lambda: f": {self.word()}",
            self.condition,
            lambda: self.random.choice(("true", "false", "! true", "echo a b", "exit 3")),
        )
        if depth > 2:
            return self.one(*simple)
        return self.one(
            *simple,
            lambda: f"{self.condition()} {self.random.choice(('&&', '||'))} {self.command(3)}",
            lambda: self.compound(depth + 1),
        )

    def compound(self, depth: int) -> str:
        text = f"if {self.condition()}; then\n{self.block(depth)}"
        while self.random.random() < 0.3:
            text += f"elif {self.condition()}\nthen {self.block(depth)}"
        if self.random.random() < 0.5:
            text += f"else\n{self.block(depth)}"
        return text + "fi"

    def block(self, depth: int) -> str:
        ends = ("\n", "; ", " # x\n", "\n\n\t", " && true\n")
        count = self.random.randrange(1, 4)
        return "".join(self.command(depth) + self.random.choice(ends) for _ in range(count))

    def spoilt(self, text: str, times: int) -> str:
        for _ in range(times):
            at = self.random.randrange(len(text) + 1)
            gone = self.random.choice((0, 0, 1, 2))
            text = text[:at] + self.random.choice(TRICKY) + text[at + gone :]
        return text + "\nexport " + " ".join(NAMES)

    def program(self) -> str:
        return self.spoilt(self.block(0), self.random.choice((0, 0, 0, 1, 2)))

    def mutant(self) -> str:
        some = self.random.sample([*TEXTS_ACCEPTED, DOCKER, BASE], 2)
        return self.spoilt("\n".join(some), self.random.choice((1, 2, 3)))

    def soup(self) -> str:
        start = self.random.choice(("A=", 'export A="', "", "if true; then ", "if false; then "))
        return start + "".join(self.random.choices(TRICKY, k=self.random.randrange(1, 12)))


def test_every_shell_agrees_on_made_up_programs(place: Path) -> None:
    programs = Programs(seed=1)
    assert assert_agreement([programs.program() for _ in range(3000)], place) > 800


def test_every_shell_agrees_on_spoilt_texts(place: Path) -> None:
    programs = Programs(seed=3)
    assert assert_agreement([programs.mutant() for _ in range(2000)], place) > 150


def test_every_shell_agrees_on_heaps_of_tricky_pieces(place: Path) -> None:
    programs = Programs(seed=2)
    assert assert_agreement([programs.soup() for _ in range(10_000)], place) > 300


def real_outcome(
    shell: Sequence[str], action: ActionRequest, files: Mapping[str, str], folder: Path
) -> Outcome:
    """Return the payload's environment when a shell runs the script, with a folder for its own."""
    place = folder / "env"
    shutil.rmtree(place, ignore_errors=True)
    (folder / "environment").unlink(missing_ok=True)
    for name, text in files.items():
        if name != "environment":
            place.mkdir(exist_ok=True)
        (folder / "environment" if name == "environment" else place / name).write_text(text)
    host = environ.collect(action, HOST)
    late = {**forwarded(action), **LATE}
    text = process.script(action, host)
    text = text.replace("-d /.singularity.d/env ", f"-d {place} ")
    text = text.replace("in /.singularity.d/env/*.sh", f"in {place}/*.sh")
    text = text.replace("-f /environment ", f"-f {folder}/environment ")
    text = text.replace("=/environment\n", f"={folder}/environment\n")
    assert text.count(str(folder)) == 4
    words = [f"{name}={value}" for name, value in late.items()]
    program = shutil.which(shell[0])
    assert program
    argv = [program, *shell[1:], "-c", 'eval "$1"', "x", text, str(len(words)), *words]
    done = subprocess.run(
        [*argv, "/usr/bin/env", "-0"], env=OWN, cwd="/", capture_output=True, check=True
    )
    return parsed(done.stdout)


HOST = {
    "HOME": "/home/host",
    "PATH": "/host/bin:/bin",
    "LANG": "en_GB.UTF-8",
    "TERM": "xterm",
    "HOSTNAME": "h",
    "SHELL": "/bin/zsh",
    "PS1": "host> ",
    "FOO": "host's",
    "EMPTIED": "by the image",
    "GPG_KEY": "",
    "APPTAINERENV_PREFIXED": "$HOME/x",
    "__MODULES": "1",
    "NOT-A-NAME": "x",
}
OWN = {
    "HOME": "/home/u",
    "SINGULARITY_NAME": "x.sif",
    "APPTAINER_CONTAINER": "/x y.sif",
    "PWD": "/",
}
LATE = {"APPTAINER_NAME": "x.sif", "APPTAINER_BIND": "", "APPTAINER_COMMAND": "exec"}
FILES = {
    "01-base.sh": ("", "#!/bin/sh\n# nothing\n", "export EARLY=1 FOO=\n"),
    "10-docker.sh": (DOCKER,),
    "10-docker2singularity.sh": (DOCKER, "export PATH=/only:/bin\n", 'export PATH=""'),
    "90-environment.sh": (
        'export FOO="image" EMPTIED=\nPATH=/opt/bin:$PATH\n',
        "UNEXPORTED=1; FOO=unexported\n[ -d / ] && export SEEN=yes",
        'export PROMPT_COMMAND="date" APPTAINER_ENVIRONMENT=/elsewhere\n',
        'export B="$A" PREFIXED="before:$PREFIXED"\n',
    ),
    "91-environment.sh": ("", "export LD_LIBRARY_PATH=/lib/x:$LD_LIBRARY_PATH\n", "PS1=\n"),
    "94-appsbase.sh": ("",),
    "95-apps.sh": (APPS,),
    "99-base.sh": (BASE, 'PS1="base> "\n'),
    "99-runtimevars.sh": (RUNTIME, "export NEVER_READ=1\n"),
    "99-z.sh": ('export LAST="$PREFIXED:$PATH" PREFIXED=x\n',),
    "a.sh": ("A=1\n",),
    "B.sh": ("export B=1\n",),
    "skipped.txt": ("export NEVER_READ=1\n",),
}
ACTIONS: tuple[dict[str, object], ...] = (
    {},
    {"cleanenv": True},
    {"no_eval": True, "env": (("A", "$HOME"), ("PATH", "/mine:$PATH"))},
    {"env": (("A", 'a"b\\"c $HOME \'\\'), ("FOO", ""), ("PREPEND_PATH", "$HOME/bin"))},
    {"env": (("APPEND_PATH", "/last"), ("PREPEND_PATH", "/first"), ("A", "two\nlines"))},
    {"env": (("PATH", "/whole"), ("LD_LIBRARY_PATH", "/libs:$LD_LIBRARY_PATH"), ("PS1", "me> "))},
)


def forwarded(action: ActionRequest) -> Outcome:
    found = environ.collect(action, HOST).forwarded
    return {name: value for name, value in found.items() if environ.is_name(name)}


def answered(action: ActionRequest, files: Mapping[str, str], folder: Path) -> Outcome:
    collected = environ.collect(action, HOST)
    prefix = "/" if "environment" in files else "/.singularity.d/env/"
    found = environment(
        [(prefix + name, text) for name, text in files.items() if not name.endswith(".txt")],
        environ.injection(collected, evaluate=not action.no_eval),
        environ.path_lines(collected, evaluate=not action.no_eval),
        OWN,
        {**forwarded(action), **LATE},
        finder(folder),
    )
    # Those that no shell can hold are beside the point of both, and come last.
    return {**found, **process.odd_names(collected)}


def request_with(facts: Mapping[str, object]) -> ActionRequest:
    return ActionRequest(command="exec", image="x.sif", **facts)  # type: ignore[arg-type]


def some_files(generator: random.Random) -> dict[str, str]:
    if generator.random() < 0.1:
        return {"environment": generator.choice(FILES["90-environment.sh"])}
    names = [name for name in FILES if generator.random() < 0.6]
    generator.shuffle(names)
    return {name: generator.choice(FILES[name]) for name in names}


@pytest.mark.parametrize("facts", ACTIONS)
def test_environment_is_what_the_script_makes(facts: Mapping[str, object], place: Path) -> None:
    generator = random.Random(4)
    action = request_with(facts)
    for _ in range(12):
        files = some_files(generator)
        answer = answered(action, files, place)
        answer = {name: value for name, value in answer.items() if name not in NOISE}
        for name, shell in SHELLS.items():
            outcome = real_outcome(shell, action, files, place)
            assert (name, files, outcome) == (name, files, answer)


def test_environment_of_an_image_from_docker(place: Path) -> None:
    files = {"10-docker2singularity.sh": DOCKER, "95-apps.sh": APPS, "99-base.sh": BASE}
    found = answered(request_with({"cleanenv": True}), files, place)
    assert found["PATH"] == (
        "/usr/local/cuda/bin:/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
    )
    assert found["NV_REQUIRE"] == "cuda>=12.0 brand=tesla,driver>=470,driver<471"
    assert found["LD_LIBRARY_PATH"].endswith("/nvidia/lib64:/.singularity.d/libs")
    assert found["LANG"] == "C.UTF-8"
    assert found["PREFIXED"] == "/home/u/x"
    assert found["PS1"] == "Apptainer> "
    assert "NO_VALUE" in found


@pytest.mark.parametrize("facts", ACTIONS)
def test_the_file_for_apps_is_passed_over_where_it_does_nothing(
    facts: Mapping[str, object], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"10-docker2singularity.sh": DOCKER, "95-apps.sh": APPS, "99-base.sh": BASE}
    read = answered(request_with(facts), files, place)
    monkeypatch.setattr(shellenv, "_FOR_APPS", {len(APPS): crc32(APPS.encode())})
    broken = {**files, "95-apps.sh": APPS.replace("fi\n", "no\n")}
    assert answered(request_with(facts), files, place) == read
    with pytest.raises(NotSimple):
        answered(request_with(facts), broken, place)
    chosen = {**files, "01-base.sh": "export SINGULARITY_APPNAME=foo\n"}
    with pytest.raises(NotSimple):
        answered(request_with(facts), chosen, place)


@pytest.mark.parametrize(
    "value", ["$(id)", "`id`", "$1", "$@", "${A:-$(id)}", "$((1))", "${A%x}", "${A"]
)
def test_an_injected_value_that_is_a_program_is_left_to_the_shell(value: str, place: Path) -> None:
    action = request_with({"env": (("A", value),)})
    with pytest.raises(NotSimple):
        answered(action, {}, place)
    found = answered(request_with({"env": (("A", value),), "no_eval": True}), {}, place)
    assert found["A"] == value


def test_an_app_is_left_to_the_shell(place: Path) -> None:
    with pytest.raises(NotSimple):
        environment([], "", "", {**OWN, "SINGULARITY_APPNAME": "foo"}, {}, finder(place))


def test_what_the_script_unsets_is_known() -> None:
    first, *words = script_of(request_with({})).splitlines()[0].split()
    assert first == "unset"
    assert set(words) == set(shellenv._FORGOTTEN)


def test_the_names_of_the_script_are_its_own() -> None:
    text = script_of(request_with({"env": (("PATH", "/x"), ("PREPEND_PATH", "/y"))}))
    names = set(re.findall(r"\b__\w+", text))
    assert {"__set", "__path", "__file"} <= names
    assert [name for name in names if not name.islower()] == []


@pytest.mark.parametrize("text", ["A=" + "x" * 70_000, "if :; then " * 500, "A=1\n" * 20_000])
def test_what_no_real_image_has_is_left_to_the_shell(text: str, place: Path) -> None:
    assert evaluated(text, place) is None


def test_expansions_do_not_fill_the_memory(place: Path) -> None:
    assert evaluated("A=xxxxxxxx\n" + "A=$A$A\n" * 1000, place) is None
    assert evaluated('A="' + "${A:-" * 1000 + "}" * 1000 + '"', place) is None


def test_the_files_of_our_images_are_simple(place: Path) -> None:
    tree = images.described_tree(images.shared_folder())
    assert environment_of_tree(tree, place)["FOO"] == "bar"


@pytest.mark.parity
def test_the_files_of_real_images_are_simple(place: Path) -> None:
    tree = images.real_sandbox(images.shared_folder())
    assert environment_of_tree(tree, place)["BAZ"] == "a b <&>"


def environment_of_tree(tree: Path, place: Path) -> Outcome:
    found = (tree / ".singularity.d/env").glob("*.sh")
    return answered(request_with({}), {file.name: file.read_text() for file in found}, place)


def test_the_file_of_our_own_builds_is_known():
    """Like Apptainer's: it does nothing unless an app was chosen, and is not read."""
    from apptainer_py.builds import skeleton

    text = skeleton._APPS
    assert shellenv._is_for_apps(text)
    assert not shellenv._is_for_apps(text.replace("exit 1", "exit 2"))
