"""Makes a small SIF image from this machine's busybox and runs it as an ordinary user."""

from __future__ import annotations

import argparse
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEFINITION = """\
Bootstrap: scratch

%labels
    Author apptainer-py
    Demo yes

%environment
    export DEMO=busybox

%runscript
    echo "Hello from the demo image"
"""
RUNSCRIPT = """\
#!/bin/sh
echo "Hello from the demo image"
exec "$@"
"""
FLOWS = {"SETUID": "setuid", "USERNS": "user-namespace", "ROOT": "root"}
LABELS = {"Author": "apptainer-py", "Demo": "yes", "org.label-schema.schema-version": "1.0"}
ENVIRONMENT = {
    "01-base.sh": "#!/bin/sh\n# Settings of the base system\n",
    "10-docker2singularity.sh": "#!/bin/sh\n",
    "90-environment.sh": "#!/bin/sh\nexport DEMO=busybox\n",
    "91-environment.sh": "#!/bin/sh\n",
}
FOLDERS = "bin dev etc home lib media mnt opt proc root run sbin srv sys tmp usr/bin var/tmp"
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": "root:x:0:\n",
    "etc/hosts": "127.0.0.1 localhost\n",
    "etc/resolv.conf": "",
    "etc/demo-release": "the apptainer-py demo image\n",
    ".singularity.d/Singularity": DEFINITION,
    ".singularity.d/labels.json": json.dumps(LABELS, indent="\t"),
}
LINKS = {
    "environment": ".singularity.d/env/90-environment.sh",
    "singularity": ".singularity.d/runscript",
}
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "i686": "386", "ppc64le": "ppc64le"}


def write_tree(root: Path) -> None:
    """Lay out a root directory with a busybox, its links and what a built image carries."""
    for folder in FOLDERS.split():
        (root / folder).mkdir(parents=True, exist_ok=True)
    for folder in ("tmp", "var/tmp"):
        (root / folder).chmod(0o1777)
    for name, content in FILES.items():
        _write(root / name, content, 0o644)
    _write(root / ".singularity.d/runscript", RUNSCRIPT, 0o755)
    for name, content in ENVIRONMENT.items():
        _write(root / ".singularity.d/env" / name, content, 0o755)
    for name, target in LINKS.items():
        (root / name).symlink_to(target)
    _copy_busybox(root)


def _write(path: Path, content: str, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(mode)


def _copy_busybox(root: Path) -> None:
    busybox = shutil.which("busybox", path="/usr/bin:/bin")
    if busybox is None:
        raise SystemExit("demo: there is no busybox: apt-get install busybox-static")
    shutil.copy(busybox, root / "bin/busybox")
    # Debian has a dynamic busybox too; a static one names no library.
    listed = subprocess.run(["/usr/bin/ldd", busybox], capture_output=True, text=True, check=False)
    for library in re.findall(r"(/\S+)", listed.stdout if listed.returncode == 0 else ""):
        target = root / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True)
    for applet in applets.stdout.split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")


def write_demo(target: Path, library: str, *, compression: str = "gzip") -> None:
    """Write the demo SIF with the package that lies in `library`.

    Raises:
        CalledProcessError: mksquashfs failed; its output was shown.
    """
    sys.path.insert(0, library)
    from apptainer_py.image.sif_write import write_sif

    epoch = 1_700_000_000
    with tempfile.TemporaryDirectory(prefix="apptainer-py-demo-") as scratch:
        root = Path(scratch) / "root"
        root.mkdir(mode=0o755)
        write_tree(root)
        squashfs = Path(scratch) / "root.squashfs"
        argv = ["/usr/bin/mksquashfs", str(root), str(squashfs), "-quiet", "-no-progress"]
        argv += ["-all-root", "-noappend", "-comp", compression, "-all-time", str(epoch)]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        write_sif(
            str(target),
            str(squashfs),
            arch=ARCHITECTURES.get(os.uname().machine, "amd64"),
            deffile=DEFINITION.encode(),
            metadata=None,
            epoch=epoch,
        )


@contextmanager
def throw_away_user() -> Iterator[pwd.struct_passwd]:
    """Create an ordinary user with a home of its own, and remove both at the end."""
    name = f"apydemo{os.getpid()}"
    home = ["--create-home", "--home-dir", f"/home/{name}"]
    subprocess.run(["useradd", "--user-group", "--shell", "/bin/sh", *home, name], check=True)
    try:
        yield pwd.getpwnam(name)
    finally:
        subprocess.run(["userdel", "--remove", name], check=False, stderr=subprocess.DEVNULL)


def as_user(user: pwd.struct_passwd, argv: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command with nothing but the ids, groups and environment of a user."""
    drop = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--init-groups"]
    drop += ["--reset-env", "--"]
    return subprocess.run(
        [*drop, *argv],
        cwd=user.pw_dir,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def flow_of(trace: Path) -> str:
    """Return the flow that the first line of a trace names."""
    with trace.open(encoding="utf-8") as lines:
        return FLOWS[json.loads(lines.readline())["flow"]]


def show(prefix: str) -> int:
    """Build the image, run it as a user who did not exist before; return an exit status."""
    program = f"{prefix}/bin/apptainer-py"
    with throw_away_user() as user:
        image = Path(user.pw_dir) / "demo.sif"
        trace = Path(user.pw_dir) / "trace"
        write_demo(image, f"{prefix}/lib/apptainer-py")
        os.chown(image, user.pw_uid, user.pw_gid)
        print(f"demo: built {image.name}, {image.stat().st_size} bytes, from this busybox")
        script = 'echo "$(id -un) (uid $(id -u)) in $(cat /etc/demo-release)"'
        argv = [program, "--trace", str(trace), "exec", image.name, "sh", "-c", script]
        print(f"demo: as {user.pw_name} (uid {user.pw_uid}): {program} exec demo.sif sh -c ...")
        done = as_user(user, argv)
        sys.stdout.write("".join(f"  {line}\n" for line in done.stdout.splitlines()))
        sys.stderr.write(done.stderr)
        if done.returncode != 0:
            print(f"demo: it failed with status {done.returncode}", file=sys.stderr)
            return 1
        print(f"demo: it ran in the {flow_of(trace)} flow")
    return 0


def main() -> int:
    """Run the demonstration, or only write the image."""
    parser = argparse.ArgumentParser(prog="demo.py", description=__doc__)
    parser.add_argument("--prefix", default="/usr/local")
    parser.add_argument("--write", metavar="SIF", help="only write the image to this file")
    parser.add_argument("--compression", default="gzip", choices=("gzip", "zstd", "xz", "lz4"))
    asked = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    if asked.write:
        library = f"{asked.prefix}/lib/apptainer-py"
        write_demo(Path(asked.write), library, compression=asked.compression)
        return 0
    return show(asked.prefix)


if __name__ == "__main__":
    sys.exit(main())
