"""Where both programs run: images, things to bind, and a working directory of the user's."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from pathlib import Path

from tests import images

SHELLS = {"bash": "/bin/bash", "dash": "/bin/dash"}


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def _libraries(program: str) -> list[str]:
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    words = [word for line in listed.splitlines() for word in line.split()]
    return [word for word in words if word.startswith("/")]


def with_shell(tree: Path, target: Path, shell: str) -> None:
    """Copy a tree, and make a shell of the host's its /bin/sh."""
    shutil.copytree(tree, target, symlinks=True)
    program = SHELLS[shell]
    for name in [program, *_libraries(program)]:
        copy = target / name.lstrip("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, copy)
    (target / "bin/sh").unlink()
    (target / "bin/sh").symlink_to(os.path.basename(program))


def _environment_files(tree: Path) -> None:
    env = tree / ".singularity.d/env"
    _write(env / "10-docker2singularity.sh", 'export PATH="/opt/tool:/usr/bin"\nexport D1=docker\n')
    _write(
        env / "90-environment.sh",
        'export FROM_IMAGE=image EMPTIED= FROM_OTHER="$D1+${FROM_HOST-nothing}"\n'
        'UNEXPORTED=1\nexport SEEN_PATH="$PATH"\nexport PREFIXED="pre:$PREFIXED"\n'
        'export MULTI="one\ntwo"\n',
    )
    _write(env / "99-base.sh", 'LD_LIBRARY_PATH="/.singularity.d/libs"\nPS1="Apptainer> "\n'
           "export LD_LIBRARY_PATH PS1\n")  # fmt: skip


def make_images(folder: Path) -> dict[str, Path]:
    """Return every image of the table by the name that it has there."""
    described = images.described_tree(folder)
    found = {
        "sif": images.real_sif(folder),
        "zstd": images.own_sif(folder),
        "squash": images.bare_squashfs(folder),
        "sandbox": images.real_sandbox(folder),
        "plain": images.small_tree(folder),
    }
    for shell in SHELLS:
        target = folder / shell
        with_shell(described, target, shell)
        _environment_files(target)
        found[shell] = target
    target = folder / "busy"
    shutil.copytree(described, target, symlinks=True)
    _environment_files(target)
    found["busy"] = target
    linked = folder / "linked"
    shutil.copytree(images.small_tree(folder), linked, symlinks=True)
    (linked / "var/run").symlink_to("/run")
    (linked / "alias").symlink_to("opt/real")
    (linked / "opt/real").mkdir()
    _write(linked / "bin/noexec", "not a program\n")
    _write(linked / "bin/noshebang", "echo ran without a first line\n", 0o755)
    _write(linked / "bin/nointerpreter", "#!/nonexistent\n", 0o755)
    found["linked"] = linked
    onetmp = folder / "onetmp"
    shutil.copytree(images.small_tree(folder), onetmp, symlinks=True)
    (onetmp / "var/tmp").rmdir()
    (onetmp / "var/tmp").symlink_to("../tmp")
    found["onetmp"] = onetmp
    broken = folder / "broken"
    shutil.copytree(found["dash"], broken, symlinks=True)
    _write(
        broken / ".singularity.d/env/10-docker2singularity.sh", "export A=1\nexport B=\"it's `\n"
    )
    found["broken"] = broken
    return found


def shared_names(folder: Path, user: pwd.struct_passwd) -> dict[str, str]:
    """Make what is only read, once for all; return the names."""
    names = {name: str(path) for name, path in make_images(folder).items()}
    _give(Path(names["sandbox"]), user)
    names["home"], names["user"] = user.pw_dir, user.pw_name
    return names


def _give(top: Path, user: pwd.struct_passwd) -> None:
    for path in [top, *top.rglob("*")]:
        os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)


def make_place(home: Path, shared: dict[str, str], user: pwd.struct_passwd) -> dict[str, str]:
    """Fill a folder with what the lines of one worker may write to; return all names."""
    for name in ("work", "data/inner", "other", "away"):
        (home / name).mkdir(parents=True)
    _write(home / "data/file", "content of file\n")
    _write(home / "data/inner/deep", "content of deep\n")
    _write(home / "other/file", "other file\n")
    _write(home / "a:b,c", "odd name\n")
    _write(home / "env", "# comment\nexport EF1=one\nEF2='two words'\nEF3=$EF1/three\nEF4=$HOME\n")
    _write(home / "env2", "EF1=later\n")
    _write(home / "env3", "EF5=1;EF6=$HOST\nEF7=$USER EF8=\"$EF5$PWD\"\nif true; then EF9=x; fi\n"
           "HOST=$HOST-2\nEFA+=1\nEFB=$'a\tb'\nreadonly EFC=c\n. /none\nEFD=\n")  # fmt: skip
    _write(home / "env-blank", "EF1 = one\n")
    _write(home / "env-open", "EF1='one\n")
    (home / "work/link").symlink_to("../data")
    shutil.copytree(shared["linked"], home / "linked", symlinks=True)
    _give(home, user)
    folders = ("work", "data", "other", "away", "env", "env2", "env3", "linked")
    return {**shared, **{name: str(home / name) for name in folders}, "place": str(home)}
