"""Definition files of many shapes, each built by Apptainer and by us; then the two trees and what
`inspect` says of them are compared.
"""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import re
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from tests.conftest import AsUser

REAL = "/usr/bin/apptainer"
LOCAL = "Bootstrap: localimage\nFrom: base.sif\n"

# Files that are not the same, and why.
DIFFERENT = {
    r"\.singularity\.d/actions/\w+": "our own scripts, which do what Apptainer's do",
    r"\.singularity\.d/env/(01-base|95-apps|99-base|99-runtimevars)\.sh": "our own, too",
    r"\.singularity\.d/labels\.json": "date and version: `inspect` compares the others",
    r"\.singularity\.d/Singularity": "comments in front of the header stay: `inspect` compares it",
    r"\.singularity\.d/startscript": "Apptainer's default has a comment: `inspect` compares it",
    r"\.singularity\.d/env/90-environment\.sh": "so has its environment: `inspect` compares it",
}
# Of one definition, and why.
DIFFERENT_OF = {
    "again": {".singularity.d/env/94-appsbase.sh": "Apptainer forgets where the base's apps are"},
    "forced": {".singularity.d/env/94-appsbase.sh": "Apptainer forgets where the base's apps are"},
}
OF_THE_DAY = ("org.label-schema.build-date", "org.label-schema.usage.apptainer.version")


class Case(NamedTuple):
    """A definition, how it is built, and what commands say of the image.

    `base` is built first, as the sandbox `base.box`.
    """

    definition: str
    options: tuple[str, ...] = ()
    base: str = ""
    says: tuple[tuple[tuple[str, ...], str], ...] = ()
    # The word IMAGE stands for the image.


STAGES = """\
# a comment before everything
Bootstrap: localimage
From: {{ FIRST }}
Stage: make

%arguments
    FIRST=base.sif
    PLACE=/made
    FILE={{ PLACE }}/program

%post
    mkdir -p {{ PLACE }}/sub
    cat << EOF > {{ FILE }}
#!/bin/sh
echo made by {{ WHO }}
EOF
    chmod 0755 {{ FILE }}
    ln -s ../program {{ PLACE }}/sub/link
    ln -s {{ FILE }} /absolute
    # a line about {{ NOTHING }}

Bootstrap: localimage
From: base.sif
Stage: middle

%files from make
    /made
%post
    touch /only-here

Bootstrap: localimage
From: base.sif
Stage: final

%arguments
    PLACE=/made

%files from make
    {{ PLACE }}/program /bin/program
    {{ PLACE }}/sub /links/
    /absolute /file
%files from middle
    /made/s* /globbed/
%labels
    who {{ WHO }}
%runscript
    exec /bin/program "$@"
"""

APPS = (
    LOCAL
    + """\
%environment
    TOP=1
    export TOP
%appinstall first
    echo "done by $SCIF_APPNAME in $SCIF_APPROOT" > done.first
    printf '#!/bin/sh\\necho tool $FIRST_VARIABLE\\n' > bin/tool.sh
    chmod 0755 bin/tool.sh
%appenv first
    FIRST_VARIABLE=first
    export FIRST_VARIABLE
%apprun first
    tool.sh "$@"
%apphelp first
    Help for the first.
    Two lines.
%applabels first
    KIND first one
    OTHER "quoted text"
%appfiles first
    hello.txt
    hello.txt renamed.txt
%apptest first
    echo testing first
%appstart first
    echo starting first
%appinstall second
    cp /scif/apps/first/done.first copied
    touch $SCIF_APPDATA/here
%applabels second
    KIND second
%apprun second
    echo second $TOP $SCIF_APPNAME
%apprun third
    echo no install
"""
)

BUSYBOX = """\
Bootstrap: scratch
%setup
    mkdir -p "${APPTAINER_ROOTFS}/bin" "${SINGULARITY_ROOTFS}/etc"
    chmod 0755 "${APPTAINER_ROOTFS}/bin"
    printf 'root:!:0:0:root:/root:/bin/sh\\n' > "${APPTAINER_ROOTFS}/etc/passwd"
    printf 'root:x:0:\\n' > "${APPTAINER_ROOTFS}/etc/group"
    cp /bin/busybox "${APPTAINER_ROOTFS}/bin/busybox"
    for name in sh ls cat env mkdir ln touch test true; do
        ln "${APPTAINER_ROOTFS}/bin/busybox" "${APPTAINER_ROOTFS}/bin/$name"
    done
%post
    ls /bin > /listed
%runscript
    exec /bin/busybox "$@"
"""

ARGUMENTS = (
    LOCAL
    + """\
%arguments
    # the defaults
    ONE=1
    TWO={{ ONE }}-two
    OVERRIDDEN=no
%files
    {{ SOURCE }} /{{ ONE }}/{{ SOURCE }}
%post
    echo '{{ TWO }} {{OVERRIDDEN}} {{  ONE  }} { { ONE } } ${ONE}' > /written
%environment
    export VALUE="{{ OVERRIDDEN }}"
%labels
    Version {{ TWO }}
%help
    Help for {{ ONE }}.
%runscript
    echo "{{ OVERRIDDEN }} $VALUE"
%startscript
    echo {{ TWO }}
%test
    test "$VALUE" = "{{ OVERRIDDEN }}"
"""
)

INTERPRETERS = (
    LOCAL
    + """\
%post -c /bin/busybox sh
    tr '\\000' ' ' < /proc/$$/cmdline > /run-by
%runscript
#!/bin/sh -e
    echo run by busybox: "$@"
    false
    echo not reached
%startscript
#!/bin/busybox sh
    echo start
%test
    test -s /run-by
%environment
    export A="b c"
"""
)

WORDS = (
    LOCAL
    + """\
%help
Words of help,
  with %signs in a line, and $VARIABLES.

%labels
MAINTAINER "Some Body <some@body.example>"
# a comment
lower case
LOWER CASE
spaced    "many   blanks"
alone
%post
echo "export FROM_POST=\\"a b\\"" >> $APPTAINER_ENVIRONMENT
k=first; echo "$k.post.label  $k" >> $APPTAINER_LABELS
k=second; echo "$k.post.label $k more" >> $SINGULARITY_LABELS
%test
ls / >/dev/null
test -d /etc
%environment
export one="a b"
two=2; export two
%runscript
cat /.singularity.d/runscript.help
%startscript
exec "$@"
%apprun only
echo only "$FROM_POST" "$one$two"
"""
)

FILES = (
    LOCAL
    + """\
%files
    hello.txt
    hello.txt /new/place/
    hello.txt /new/renamed
    "two words" "/new/two words"
    h*.txt /globbed/
    folder /copied
    folder/ /slash
    folder /into/
    link /followed
    # a comment
    folder/inner /etc
%post
    cat /new/renamed
"""
)

LINKS = (
    LOCAL
    + """\
Stage: one
%post
    touch /target
    mkdir -p /folder/deep
    ln -s ../target /folder/relative
    ln -s /target /folder/absolute
    ln -s nowhere /folder/dangling
    chmod 0750 /folder/deep
    touch /folder/deep/private; chmod 0600 /folder/deep/private
    chown 12:34 /folder/deep/private

"""
    + LOCAL
    + """\
Stage: two
%files from one
    /folder
    /folder/deep/private /own
%post
    ln -s /etc /var/etc
    mkdir /madness
    ln -s /madness /var/etc/madness
"""
)

WRITTEN = """\
# BootStrap in the way of old files
BootStrap:localimage
FROM : base.sif   # behind it

%POST
    echo first > /order
%Environment
    export A=1

%labels

%post
    echo second >> /order
%environment
    export B=$A
%runscript

    echo "$A$B"

%setup
%test
"""

AGAIN = """\
Bootstrap: localimage
From: base.box
%labels
    kept other
    added new
%environment
    export OLD=$OLD-changed
    export NEW=1
%post
    echo "export POSTED=2" >> $APPTAINER_ENVIRONMENT
    echo "posted two" >> $APPTAINER_LABELS
%help
    New help.
"""
BASE = (
    LOCAL
    + """\
%labels
    kept first
%environment
    export OLD=old
%post
    echo "export POSTED=1" >> $APPTAINER_ENVIRONMENT
%help
    Old help.
%runscript
    echo base "$OLD" "$NEW" "$POSTED"
%startscript
    echo base starts
%test
    true
%apprun one
    echo app one
"""
)

SECTIONS = (
    LOCAL
    + """\
%setup
    touch "$APPTAINER_ROOTFS/from-setup"
%files
    hello.txt /hello
%post
    touch /from-post
%labels
    A b
%environment
    export A=1
%test
    true
%runscript
    echo run
"""
)

ODD = (
    LOCAL
    + """\
%post -u
    echo "a\x0cb\u2028c" > /written
    echo "both post" >> $APPTAINER_LABELS
%labels
    both section
    bytes a\udcffb
    org.label-schema.build-arch other
%runscript
    #!/bin/busybox sh
    echo "x\x0by"
"""
)

IMAGE = "IMAGE"
CASES = {
    "stages": Case(
        STAGES,
        ("--build-arg", "WHO=me"),
        says=((("run", IMAGE), "made by me\n"),),
    ),
    "apps": Case(
        APPS,
        says=(
            (("run", "--app", "first", IMAGE), "tool first\n"),
            (("run", "--app", "second", IMAGE), "second 1 second\n"),
            (("test", "--app", "first", IMAGE), "testing first\n"),
            (("inspect", "--list-apps", IMAGE), "first\nsecond\nthird\n"),
            (("run-help", "--app", "first", IMAGE), "    Help for the first.\n    Two lines."),
        ),
    ),
    "busybox": Case(BUSYBOX, says=((("run", IMAGE, "echo", "a"), "a\n"),)),
    "arguments": Case(
        ARGUMENTS,
        ("--build-arg", "OVERRIDDEN=yes", "--build-arg-file", "values"),
        says=((("run", IMAGE), "yes yes\n"),),
    ),
    "interpreters": Case(INTERPRETERS, says=((("run", IMAGE, "x y"), "run by busybox: x y\n"),)),
    "words": Case(WORDS, says=((("run", "--app", "only", IMAGE), "only a b a b2\n"),)),
    "files": Case(FILES),
    "links": Case(LINKS),
    "written": Case(WRITTEN, says=((("run", IMAGE), "11\n"),)),
    "again": Case(AGAIN, base=BASE, says=((("run", IMAGE), "base old-changed 1 2\n"),)),
    "forced": Case(AGAIN, ("--force",), base=BASE),
    "odd": Case(ODD, says=((("run", IMAGE), "x\x0by\n"),)),
    "sections": Case(SECTIONS, ("--section", "files,environment,post,test")),
}
QUICK = ("stages", "apps", "odd")


@pytest.fixture(scope="module")
def folder(readable_tmp: Path, demo_sif: Path, user: pwd.struct_passwd, open_fuse: None) -> Path:
    """The user's folder with what the definitions name."""
    if not os.access(REAL, os.X_OK):
        pytest.skip("the real Apptainer is not installed: run ./check")
    made = readable_tmp / "definitions"
    (made / "folder/inner").mkdir(parents=True)
    (made / "tmp").mkdir()
    (made / "base.sif").symlink_to(demo_sif)
    (made / "hello.txt").write_text("hello\n")
    (made / "two words").write_text("two\n")
    (made / "values").write_text("# of a file\nSOURCE=hello.txt\nOVERRIDDEN=file\n")
    (made / "folder/a").write_text("a\n")
    (made / "folder/inner/b").write_text("b\n")
    (made / "folder/a").chmod(0o640)
    (made / "link").symlink_to("folder")
    (made / "folder/inner/link").symlink_to("../a")
    for path in (made, *made.rglob("*")):
        if not path.is_symlink():
            os.chown(path, user.pw_uid, user.pw_gid)
    return made


def tree(root: Path) -> dict[str, tuple[str, str]]:
    """Return kind, mode, owner and content (or target) by path."""
    found = {}
    for above, folders, files in os.walk(root):
        for name in folders + files:
            path = Path(above, name)
            facts = path.lstat()
            # The real one runs scripts with the umask 0002, we leave them the caller's.
            shown = f"{facts.st_mode & ~0o020:o} {facts.st_uid}:{facts.st_gid}"
            inside = str(path.relative_to(root))
            content = ""
            if stat.S_ISLNK(facts.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(facts.st_mode) and not any(
                re.fullmatch(pattern, inside) for pattern in DIFFERENT
            ):
                data = path.read_bytes()
                content = data.decode() if len(data) < 4096 else hashlib.sha256(data).hexdigest()
            found[inside] = (shown, content)
    return found


def without_the_day(value: object) -> object:
    """Return a JSON value without the labels that differ each day, texts without comments."""
    if isinstance(value, dict):
        return {key: without_the_day(one) for key, one in value.items() if key not in OF_THE_DAY}
    if isinstance(value, str):
        lines = [line for line in value.splitlines() if not re.match(r"\s*(#(?!!)|$)", line)]
        return "\n".join(lines)
    return value


Make = Callable[[str, Case, str], Path]


@pytest.fixture(scope="module")
def make(product: SimpleNamespace, as_user: AsUser, folder: Path) -> Make:
    """Build a case as the ordinary user with a program; returns the sandbox."""

    def build(program: str, *words: str, definition: str) -> None:
        path = folder / "definition"
        path.write_bytes(definition.encode("utf-8", "surrogateescape"))
        environ = {"APPTAINER_TMPDIR": str(folder / "tmp")}
        argv = [program, "build", "--sandbox", *words, str(path)]
        done = as_user(argv, cwd=folder, env=environ)
        assert done.returncode == 0, (program, done.stderr)

    def run(name: str, case: Case, who: str) -> Path:
        program = REAL if who == "theirs" else product.program
        if case.base:
            build(program, "--force", "base.box", definition=case.base)
        target = folder / f"{name}.{who}"
        if "--force" not in case.options or not target.exists():
            build(program, *case.options, target.name, definition=case.definition)
        return target

    return run


def each_case() -> list[object]:
    marks = {name: () if name in QUICK else (pytest.mark.long,) for name in CASES}
    return [pytest.param(name, marks=marks[name], id=name) for name in CASES]


@pytest.mark.parametrize("name", each_case())
def test_a_definition_gives_the_same_image(
    make: Make, product: SimpleNamespace, as_user: AsUser, folder: Path, name: str
) -> None:
    case = CASES[name]
    theirs, ours = make(name, case, "theirs"), make(name, case, "ours")
    wanted, found = tree(theirs), tree(ours)
    assert sorted(set(wanted) ^ set(found)) == []
    allowed = DIFFERENT_OF.get(name, {})
    different = {path for path in wanted if wanted[path] != found[path]} - set(allowed)
    assert {path: (wanted[path], found[path]) for path in different} == {}
    said = []
    for image in (theirs, ours):
        for program in (REAL, product.program):
            done = as_user([program, "inspect", "--all", "--json", image.name], cwd=folder)
            assert done.returncode == 0, done.stderr
            said.append(without_the_day(json.loads(done.stdout)))
            for words, answer in case.says:
                argv = [program, *(image.name if word == IMAGE else word for word in words)]
                told = as_user(argv, cwd=folder)
                assert told.stdout.startswith(answer), (argv, told.stdout, told.stderr)
    assert said[1:] == said[:1] * 3


def test_an_image_without_a_runscript_says_so(
    product: SimpleNamespace, as_user: AsUser, folder: Path
) -> None:
    definition = BUSYBOX.partition("%runscript")[0]
    (folder / "silent").write_text(definition)
    done = as_user([product.program, "build", "silent.box", "silent", "--sandbox"], cwd=folder)
    assert done.returncode == 0, done.stderr
    told = as_user([product.program, "run", "silent.box"], cwd=folder)
    assert told.stdout == "There is no runscript defined for this container\n"


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("%files\n    nothing /a\n", (), "while copying nothing to /a: nothing: No such file"),
        ("%files\n    dangling /a\n", (), "to /a: /bin/cp: cannot stat 'dangling/x': No such"),
        ("%appinstall a\n    false\n", (), "it failed in line 4 of section %appinstall: false"),
        ("", ("--mksquashfs-args", "-wrong"), "invalid option"),
    ],
)
def test_what_fails_is_named(
    product: SimpleNamespace,
    as_user: AsUser,
    folder: Path,
    user: pwd.struct_passwd,
    text: str,
    options: tuple[str, ...],
    says: str,
) -> None:
    dangling = folder / "dangling"
    if not dangling.exists():
        dangling.mkdir()
        (dangling / "x").symlink_to("nowhere")
    (folder / "failing").write_text(LOCAL + text)
    before = sorted(folder.iterdir())
    done = as_user([product.program, "build", *options, "failing.sif", "failing"], cwd=folder)
    assert done.returncode == 255
    assert says in done.stderr
    assert sorted(folder.iterdir()) == before
