"""checkpoint and restore, with every flag that this machine can tell the effect of."""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.oci import bed as beds
from tests.oci.bed import DEADLINE_S, eventually, pseudo_terminal_from
from tests.oci.runtimes import PEERS

# It counts in a file, so that one sees whether it goes on where it was; it never forks.
COUNT = (
    "trap 'exit 7' TERM; n=0; while :; do n=$((n+1)); echo $n >/tmp/new; mv /tmp/new /tmp/n;"
    " read -t 1 x </tmp/never; done"
)


@functools.cache
def criu() -> Path | None:
    """Return a CRIU that this kernel lets work."""
    for path in (PEERS / "sbin/criu", Path("/usr/sbin/criu")):
        if not os.access(path, os.X_OK):
            continue
        done = subprocess.run([path, "check"], capture_output=True, text=True)
        version = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        # The releases before 4 take this for good, and then do not restore.
        if done.returncode == 0 and "Version: 3." not in version:
            return path
    return None


def can(feature: str) -> bool:
    """Return whether kernel and CRIU have a feature."""
    argv = [str(criu()), "check", "--feature", feature]
    return subprocess.run(argv, capture_output=True).returncode == 0


@pytest.fixture(autouse=True)
def criu_in_path(monkeypatch):
    found = criu()
    if found is None:
        pytest.skip("did not run: no CRIU that works here is installed (tests/oci/setup-criu)")
    monkeypatch.setenv("PATH", f"{found.parent}:{os.environ['PATH']}")


@pytest.fixture
def images(bed) -> Path:
    return bed.place / "images"


def counting(bundle: beds.Bundle) -> beds.Bundle:
    bundle.config["root"]["readonly"] = False
    if not (bundle.rootfs / "tmp/n").exists():
        (bundle.rootfs / "tmp/n").write_text("0")
    never = bundle.rootfs / "tmp/never"
    if not never.exists():
        os.mkfifo(never)
    # Kept open for both, so that opening it does not wait.
    return bundle.shell(f"exec 9<>/tmp/never; {COUNT.replace('</tmp/never', '<&9')}")


def count(bundle: beds.Bundle) -> int:
    return int((bundle.rootfs / "tmp/n").read_text())


def goes_on(bundle: beds.Bundle) -> None:
    before = count(bundle)
    eventually(lambda: count(bundle) > before, "the payload goes on")


def running(bed, bundle, *flags: str) -> beds.Container:
    made = bed.create(
        counting(bundle), *flags, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    made.start()
    eventually(lambda: count(bundle) > 0, "the payload has begun")
    return made


def restored(bed, bundle, images: Path, *flags: str, name: str = "", **how) -> beds.Container:
    """Restore a bundle, detached; its first process is ours, as that of `create` is."""
    name = name or bed.name()
    pid_file = bundle.path / f"{name}.pid"
    words = ("restore", "--detach", "--image-path", str(images), "--bundle", str(bundle.path))
    nowhere = subprocess.DEVNULL
    streams = {"stdin": nowhere, "stdout": nowhere, "stderr": subprocess.PIPE, **how}
    argv = bed.argv(*words, "--pid-file", str(pid_file), *flags, name)
    # What it leaves behind keeps the pipe open, so it is only read where it has failed.
    with open(bundle.path / f"{name}.err", "w+") as errors:
        if streams["stderr"] == subprocess.PIPE:
            streams["stderr"] = nowhere
            argv = [argv[0], "--log", str(bundle.path / f"{name}.err"), *argv[1:]]
        done = subprocess.run(argv, timeout=60, **streams)
        assert done.returncode == 0, errors.read()
    made = beds.Container(bed, name, bundle)
    bed.containers.append(made)
    return made


def gone(bed, container: beds.Container) -> None:
    container.wait()
    said = bed.bad("state", container.id)
    assert "container does not exist" in said


def test_there_and_back(bed, bundle, images):
    first = running(bed, bundle)
    bed.good("checkpoint", "--image-path", str(images), first.id)
    gone(bed, first)
    assert json.loads((images / "descriptors.json").read_text()) == ["/dev/null"] * 3
    at = count(bundle)
    second = restored(bed, bundle, images, name=first.id)
    state = second.state()
    assert (state["status"], state["pid"]) == ("running", second.pid)
    assert state["bundle"] == str(bundle.path)
    goes_on(bundle)
    assert count(bundle) > at
    done = second.exec("hostname")
    assert (done.returncode, done.stdout) == (0, "runc\n"), done.stderr
    pids = json.loads(bed.good("ps", "--format", "json", second.id).stdout)
    assert second.pid in pids
    bed.good("pause", second.id)
    assert second.status() == "paused"
    bed.good("resume", second.id)
    second.kill("TERM")
    assert second.wait() == 7
    second.delete()


def test_there_and_back_twice(bed, bundle, images):
    one = running(bed, bundle)
    for number in range(2):
        target = images.with_name(f"images-{number}")
        bed.good("checkpoint", "--image-path", str(target), one.id)
        gone(bed, one)
        one = restored(bed, bundle, target)
        goes_on(bundle)
    one.finish()


def test_the_usual_directory(bed, bundle):
    first = running(bed, bundle)
    bed.good("checkpoint", first.id, cwd=bundle.path)
    gone(bed, first)
    assert (bundle.path / "checkpoint/inventory.img").is_file()
    assert (bundle.path / "checkpoint/dump.log").is_file()


def test_it_may_go_on(bed, bundle, images):
    first = running(bed, bundle)
    bed.good("checkpoint", "--leave-running", "--image-path", str(images), first.id)
    assert first.status() == "running"
    goes_on(bundle)
    first.finish()
    second = restored(bed, bundle, images)
    goes_on(bundle)
    second.finish()


def test_memory_first(bed, bundle, images):
    if not can("mem_dirty_track"):
        pytest.skip("did not run: the kernel does not track which memory was written")
    first = running(bed, bundle)
    images.mkdir()
    bed.good("checkpoint", "--pre-dump", "--image-path", str(images / "before"), first.id)
    assert first.status() == "running"
    assert not (images / "before/inventory.img").exists()
    assert (images / "before/pagemap-1.img").exists()
    goes_on(bundle)
    words = ("--parent-path", "../before", "--image-path", str(images / "last"))
    bed.good("checkpoint", *words, first.id)
    gone(bed, first)
    assert os.path.realpath(images / "last/parent") == str(images / "before")
    second = restored(bed, bundle, images / "last")
    goes_on(bundle)
    second.finish()


def test_where_logs_go(bed, bundle, images):
    first = running(bed, bundle)
    work = bed.place / "work"
    words = ("--work-path", str(work), "--image-path", str(images))
    bed.good("checkpoint", *words, first.id)
    gone(bed, first)
    assert (work / "dump.log").is_file()
    assert not (images / "dump.log").exists()
    second = restored(bed, bundle, images, "--work-path", str(work))
    assert (work / "restore.log").is_file()
    second.finish()


def test_pipes_are_those_of_the_caller(bed, bundle, images):
    counting(bundle).shell("while read line; do echo got $line; done")
    theirs, ours = os.pipe()
    out, into = os.pipe()
    first = bed.create(bundle, stdin=theirs, stdout=into, stderr=subprocess.DEVNULL)
    first.start()
    os.write(ours, b"one\n")
    assert os.read(out, 100) == b"got one\n"
    bed.good("checkpoint", "--image-path", str(images), first.id)
    gone(bed, first)
    links = json.loads((images / "descriptors.json").read_text())
    assert [link.partition(":")[0] for link in links] == ["pipe", "pipe", "/dev/null"]
    for fd in (theirs, ours, out, into):
        os.close(fd)
    theirs, ours = os.pipe()
    out, into = os.pipe()
    second = restored(bed, bundle, images, stdin=theirs, stdout=into)
    os.close(theirs)
    os.close(into)
    os.write(ours, b"two\n")
    assert os.read(out, 100) == b"got two\n"
    # The end of its input is the end of it: nobody else holds the other end.
    os.close(ours)
    assert second.wait() == 0
    os.close(out)


def test_a_console(bed, bundle, images):
    bundle.process["terminal"] = True
    counting(bundle).shell("while read line; do echo got $line; done")
    place = bed.place / "console"
    listener, receive = pseudo_terminal_from(place)
    with listener:
        first = bed.create(bundle, "--console-socket", str(place))
        master = receive()
    first.start()
    os.write(master, b"one\n")
    said_on(master, b"got one")
    bed.good("checkpoint", "--image-path", str(images), first.id)
    gone(bed, first)
    os.close(master)
    place.unlink()
    said = bed.bad("restore", "-d", "--image-path", str(images), "-b", str(bundle.path), "x-y")
    assert "cannot allocate tty if runc will detach without setting console socket" in said
    listener, receive = pseudo_terminal_from(place)
    with listener:
        second = restored(bed, bundle, images, "--console-socket", str(place))
        master = receive()
    os.write(master, b"two\n")
    said_on(master, b"got two")
    second.finish()
    os.close(master)


def said_on(master: int, until: bytes) -> None:
    found = b""
    poll = select.poll()
    poll.register(master, select.POLLIN)
    while until not in found:
        assert poll.poll(DEADLINE_S * 1000), found
        found += os.read(master, 65536)


def test_in_the_foreground(bed, bundle, images):
    first = running(bed, bundle)
    bed.good("checkpoint", "--image-path", str(images), first.id)
    gone(bed, first)
    before = count(bundle)
    name = bed.name()
    words = ("restore", "--image-path", str(images), "--bundle", str(bundle.path), name)
    nowhere = subprocess.DEVNULL
    with subprocess.Popen(bed.argv(*words), stdin=nowhere, stdout=nowhere, stderr=nowhere) as call:
        eventually(lambda: count(bundle) > before, "the payload goes on")
        eventually(lambda: bed.call("state", name).returncode == 0, "its state can be had")
        bed.good("kill", name, "TERM")
        assert call.wait(DEADLINE_S) == 7
    assert "container does not exist" in bed.bad("state", name)


def test_signals_are_passed_on(bed, bundle, images):
    first = running(bed, bundle)
    bed.good("checkpoint", "--image-path", str(images), first.id)
    gone(bed, first)
    name = bed.name()
    pid_file = bed.place / "pid"
    words = ("--image-path", str(images), "--bundle", str(bundle.path), "--pid-file", str(pid_file))
    nowhere = subprocess.DEVNULL
    argv = bed.argv("restore", *words, name)
    with subprocess.Popen(argv, stdin=nowhere, stdout=nowhere, stderr=nowhere) as call:
        eventually(pid_file.exists, "it is restored")
        call.send_signal(signal.SIGTERM)
        assert call.wait(DEADLINE_S) == 7


def test_what_is_bound(bed, bundle, images):
    folder = bed.place / "shared"
    (folder / "sub").mkdir(parents=True)
    (folder / "file").write_text("first\n")
    bundle.mount("/mnt", "none", str(folder), "rbind", "rw")
    bundle.mount("/mnt/sub/deeper", "none", str(folder / "sub"), "bind")
    bundle.mount("/etc/one", "none", str(folder / "file"), "bind", "ro")
    first = running(bed, bundle)
    bed.good("checkpoint", "--image-path", str(images), first.id)
    gone(bed, first)
    (folder / "file").write_text("second\n")
    second = restored(bed, bundle, images)
    assert second.exec("cat", "/etc/one").stdout == "second\n"
    assert second.exec("ls", "/mnt").stdout.split() == ["file", "sub"]
    assert second.exec("sh", "-c", "echo x >/etc/one").returncode == 1
    second.finish()
    assert not beds.mounts_below(bed.place)


def test_what_is_hidden_stays_hidden(bed, bundle, images):
    (bundle.rootfs / "secret").write_text("word\n")
    (bundle.rootfs / "folder").mkdir()
    (bundle.rootfs / "folder/secret").write_text("word\n")
    bundle.linux["maskedPaths"] += ["/secret", "/folder", "/nothing"]
    first = running(bed, bundle)
    bed.good("checkpoint", "--image-path", str(images), first.id)
    gone(bed, first)
    second = restored(bed, bundle, images)
    assert second.exec("cat", "/secret").stdout == ""
    assert second.exec("ls", "/folder").stdout == ""
    assert second.exec("sh", "-c", "echo 1 >/proc/sys/kernel/ctrl-alt-del").returncode == 1
    second.finish()


def test_its_limits(bed, bundle, images):
    bundle.linux["resources"]["pids"] = {"limit": 77}
    bundle.linux["cgroupsPath"] = f"/{bed.name()}-a"
    first = running(bed, bundle)
    bed.good("checkpoint", "--image-path", str(images), first.id)
    gone(bed, first)
    path = f"/{bed.name()}-b"
    bundle.linux["cgroupsPath"] = path
    bundle.linux["resources"]["pids"] = {"limit": 78}
    bundle.write()
    second = restored(bed, bundle, images)
    own = (Path("/proc") / str(second.pid) / "cgroup").read_text()
    assert f":{path}\n" in own
    assert "-a\n" not in own
    folder = beds.cgroup_folder("pids", path)
    assert (folder / "pids.max").read_text() == "78\n"
    bed.good("update", "--pids-limit", "79", second.id)
    assert (folder / "pids.max").read_text() == "79\n"
    second.finish()


def test_a_network_namespace_of_others(bed, bundle, images):
    with subprocess.Popen(["unshare", "-n", "sleep", "600"]) as owner:
        own = os.readlink("/proc/self/ns/net")
        path = f"/proc/{owner.pid}/ns/net"
        eventually(lambda: os.readlink(path) != own, "it is in its own namespace")
        bundle.space("network", path)
        first = running(bed, bundle)
        bed.good("checkpoint", "--image-path", str(images), first.id)
        gone(bed, first)
        second = restored(bed, bundle, images)
        assert os.readlink(f"/proc/{second.pid}/ns/net") == os.readlink(path)
        second.finish()
        owner.kill()


def test_hooks_of_a_restore(bed, bundle, images):
    log = bed.place / "log"
    for kind in ("prestart", "createRuntime", "poststop"):
        bundle.hook(kind, f'echo {kind} $(tr -d "\\n" | grep -o "\\"id\\":\\"[^\\"]*") >>{log}')
    first = running(bed, bundle)
    log.write_text("")
    bed.good("checkpoint", "--image-path", str(images), first.id)
    assert log.read_text().split()[:1] == ["poststop"]
    gone(bed, first)
    log.write_text("")
    second = restored(bed, bundle, images)
    assert [line.split()[0] for line in log.read_text().splitlines()] == [
        "prestart",
        "createRuntime",
    ]
    assert second.id in log.read_text()
    second.finish()


def test_a_hook_that_fails_leaves_nothing(bed, bundle, images):
    first = running(bed, bundle)
    bed.good("checkpoint", "--image-path", str(images), first.id)
    gone(bed, first)
    bundle.hook("createRuntime", "echo no >&2; exit 3").write()
    words = ("restore", "-d", "--image-path", str(images), "--bundle", str(bundle.path))
    name = bed.name()
    assert "error running createRuntime hook #0" in bed.bad(*words, name)
    assert not (bed.root / name).exists()


def test_a_user_namespace(bed, bundle, images):
    counting(bundle)
    bundle.user_space()
    first = running(bed, bundle)
    bed.good("checkpoint", "--image-path", str(images), first.id)
    gone(bed, first)
    # CRIU opens the files again as the container's root.
    images.chmod(0o755)
    for path in images.iterdir():
        path.chmod(0o644)
    second = restored(bed, bundle, images)
    goes_on(bundle)
    assert Path(f"/proc/{second.pid}/uid_map").read_text().split() == ["0", "100000", "65536"]
    second.finish()


def test_flags_that_change_nothing_here(bed, bundle, images):
    first = running(bed, bundle)
    both = ("--tcp-established", "--ext-unix-sk", "--shell-job", "--file-locks", "--auto-dedup")
    both += ("--empty-ns", "network", "--manage-cgroups-mode", "soft")
    words = ("--tcp-skip-in-flight", "--image-path", str(images))
    bed.good("checkpoint", *both, *words, first.id)
    gone(bed, first)
    second = restored(bed, bundle, images, *both, "--no-subreaper", "--no-pivot")
    goes_on(bundle)
    second.finish()


def test_a_deleted_file_needs_its_flag(bed, bundle, images):
    """A name that went while another stayed: CRIU may link it again, if it is told so."""
    counting(bundle)
    (bundle.rootfs / "tmp/kept").write_text("kept\n")
    script = "ln /tmp/kept /tmp/other; exec 8</tmp/other; rm /tmp/other; "
    bundle.process["args"][-1] = script + bundle.process["args"][-1]
    first = bed.create(bundle, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first.start()
    eventually(lambda: count(bundle) > 0, "the payload has begun")
    bed.bad("checkpoint", "--image-path", str(images), first.id)
    bed.good("checkpoint", "--link-remap", "--image-path", str(images), first.id)
    gone(bed, first)
    second = restored(bed, bundle, images)
    goes_on(bundle)
    second.finish()


def test_pages_by_the_network(bed, bundle, images):
    """--page-server sends memory to a server instead of to the images."""
    first = running(bed, bundle)
    images.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = [criu(), "page-server", "-D", str(images), "--address", "127.0.0.1"]
    with subprocess.Popen([*argv, "--port", str(port), "-o", str(bed.place / "ps.log")]) as server:
        listening = f"0100007F:{port:04X}"
        eventually(lambda: listening in Path("/proc/net/tcp").read_text(), "the server listens")
        words = ("--page-server", f"127.0.0.1:{port}", "--image-path", str(images))
        bed.good("checkpoint", *words, first.id)
        assert server.wait(DEADLINE_S) == 0
    gone(bed, first)
    second = restored(bed, bundle, images)
    goes_on(bundle)
    second.finish()


def test_pages_when_they_are_wanted(bed, bundle, images):
    """--lazy-pages: a byte on --status-fd says when the memory can be asked for."""
    if not can("uffd-noncoop"):
        pytest.skip("did not run: the kernel has no userfaultfd for CRIU")
    first = running(bed, bundle)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ready, status = os.pipe()
    words = ("--lazy-pages", "--page-server", f"127.0.0.1:{port}", "--status-fd", str(status))
    argv = bed.argv("checkpoint", *words, "--image-path", str(images), first.id)
    nowhere = subprocess.DEVNULL
    with subprocess.Popen(argv, pass_fds=[status], stdout=nowhere, stderr=nowhere) as dump:
        os.close(status)
        assert os.read(ready, 1) == b"\0"
        os.close(ready)
        # Whoever asks goes again, and the container goes on.
        socket.create_connection(("127.0.0.1", port)).close()
        dump.wait(DEADLINE_S)
    if bed.call("state", first.id).returncode == 0:
        first.finish()
    else:
        gone(bed, first)


def test_memory_that_is_not_tracked(bed, bundle, images):
    if can("mem_dirty_track"):
        pytest.skip("did not run: the kernel tracks which memory was written")
    first = running(bed, bundle)
    said = bed.bad("checkpoint", "--pre-dump", "--image-path", str(images), first.id)
    assert "criu is missing features: [MemTrack]" in said
    goes_on(bundle)
    first.finish()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--manage-cgroups-mode", "bad"), "invalid manage-cgroups-mode value"),
        (("--empty-ns", "pid"), 'namespace "pid" is not supported'),
        (("--page-server", "here"), "Use --page-server ADDRESS:PORT to specify page server"),
        (("--page-server", "here:x"), "Invalid port number"),
        (("--parent-path", "/x"), "--parent-path must be relative"),
        (("--parent-path", "x"), "invalid --parent-path: stat "),
        (("--lazy-pages", "--status-fd", "77"), "invalid --status-fd argument 77: bad file"),
        (("--work-path", "/nowhere/at/all"), "mkdir /nowhere/at/all: no such file or directory"),
    ],
)
def test_flags_that_are_wrong(bed, bundle, images, words, said):
    first = running(bed, bundle)
    quoted = said.replace('"', '\\"')
    assert quoted in bed.bad("checkpoint", "--image-path", str(images), *words, first.id)
    assert first.status() == "running"
    goes_on(bundle)
    first.finish()


def test_a_container_that_does_not_run(bed, bundle, images):
    words = ("checkpoint", "--image-path", str(images))
    assert "container does not exist" in bed.bad(*words, "nobody")
    first = bed.create(counting(bundle))
    said = bed.bad(*words, first.id)
    assert "Container cannot be checkpointed in created state" in said
    first.kill()
    first.wait()
    said = bed.bad(*words, first.id)
    assert "Container cannot be checkpointed in stopped state" in said
    assert not images.exists()
    first.delete()


def test_what_cannot_be_restored(bed, bundle, images):
    words = ("restore", "-d", "--image-path", str(images), "--bundle", str(bundle.write().path))
    name = bed.name()
    said = bed.bad(*words, name)
    assert f"open {images}/descriptors.json: no such file or directory" in said
    assert not (bed.root / name).exists()
    first = running(bed, bundle)
    assert "container with given ID already exists" in bed.bad(*words, first.id)
    assert first.status() == "running"
    first.finish()


def test_images_of_something_else(bed, bundle, images):
    first = running(bed, bundle)
    bed.good("checkpoint", "--image-path", str(images), first.id)
    gone(bed, first)
    (images / "pstree.img").write_bytes(b"nothing of the kind")
    words = ("restore", "-d", "--image-path", str(images), "--bundle", str(bundle.path))
    name = bed.name()
    said = bed.bad(*words, name)
    assert "criu failed: type RESTORE" in said
    assert "--- Quoting" in said
    assert not (bed.root / name).exists()


def test_no_criu_at_all(bed, bundle, images, monkeypatch):
    first = running(bed, bundle)
    monkeypatch.setenv("PATH", "/nowhere")
    said = bed.bad("checkpoint", "--image-path", str(images), first.id)
    assert 'CRIU version check failed: exec: \\"criu\\": executable file not found in $PATH' in said
    monkeypatch.undo()
    first.finish()
