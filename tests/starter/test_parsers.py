"""What the starter reads of a user's bytes, in C: built with ASan and UBSan, and fuzzed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STARTER = HERE.parent.parent / "starter"
FLAGS = """
-D_GNU_SOURCE= -std=gnu11 -g -O1 -Wall -Wextra -Werror -Wconversion -Wshadow -Wstrict-prototypes
-Wmissing-prototypes -Wvla -Wformat=2 -Wundef -Wswitch-enum -Wwrite-strings -Wcast-qual
-Wimplicit-fallthrough=3 -fno-sanitize-recover=all -fsanitize=address,undefined
""".split()
CONFIG = ("config.c", "config_open.c", "config_value.c")
# Each test includes the file that it looks into, and is linked with those which that one needs.
TESTS = {
    "test_early": ("report.c", *CONFIG),
    "test_grants": (),
    "test_policy_mounts": ("report.c", *CONFIG),
    "test_report": (),
    "test_request": ("report.c",),
    "test_wire": (),
}
FUZZERS = {
    "fuzz_bearer": (),
    "fuzz_command": (),
    "fuzz_grants": (),
    "fuzz_image": ("report.c",),
    "fuzz_keeper": ("report.c", "wire.c", "policy.c", *CONFIG),
    "fuzz_network": ("report.c",),
    "fuzz_process": (),
    "fuzz_record": (),
    "fuzz_request": ("report.c",),
    "fuzz_rpc": ("report.c", "wire.c", "policy_mounts.c", *CONFIG),
    "fuzz_rules": ("report.c",),
}
# Iterations of about a second, and of a part of the minute that CI has for all of them.
SHORT = {
    "fuzz_bearer": 10_000,
    "fuzz_command": 300_000,
    "fuzz_grants": 500_000,
    "fuzz_image": 100_000,
    "fuzz_keeper": 10_000,
    "fuzz_network": 200_000,
    "fuzz_process": 200_000,
    "fuzz_record": 300_000,
    "fuzz_request": 2_000_000,
    "fuzz_rpc": 50_000,
    "fuzz_rules": 200_000,
}
LONG = {
    "fuzz_bearer": 100_000,
    "fuzz_command": 3_000_000,
    "fuzz_grants": 5_000_000,
    "fuzz_image": 300_000,
    "fuzz_keeper": 200_000,
    "fuzz_network": 1_500_000,
    "fuzz_process": 1_500_000,
    "fuzz_record": 3_000_000,
    "fuzz_request": 20_000_000,
    "fuzz_rpc": 400_000,
    "fuzz_rules": 2_000_000,
}
SEEDS = (1, 20, 300)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("parsers")

    def build(name: str, needs: tuple[str, ...]) -> Path:
        target = folder / name
        if not target.exists():
            sources = [HERE / f"{name}.c", *(STARTER / other for other in needs)]
            subprocess.run(["gcc", *FLAGS, *map(str, sources), "-o", str(target)], check=True)
        return target

    return build


@pytest.mark.parametrize("name", TESTS)
def test_units(built, name: str) -> None:
    done = subprocess.run([built(name, TESTS[name])], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def fuzz(program: Path, seed: int, iterations: int) -> None:
    done = subprocess.run(
        [program, str(seed), str(iterations)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    # Were everything refused at the door, nothing behind it would have been tried.
    assert int(done.stdout) > iterations / 100


@pytest.mark.parametrize("name", FUZZERS)
def test_hostile_bytes(built, name: str) -> None:
    fuzz(built(name, FUZZERS[name]), 7, SHORT[name])


@pytest.mark.long
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", FUZZERS)
def test_hostile_bytes_for_longer(built, name: str, seed: int) -> None:
    fuzz(built(name, FUZZERS[name]), seed, LONG[name])


# ---- what a fuzzer is worth: each of these holes was open once, or would be the next ----

KILLS_A_STRANGER = "a signal goes to a child of ours"
IN_EARLY = """ /* begun early, and gone: it will be started again */
        k->container = 0;
"""
WEAKENED = {
    "stale container": ("keeper", IN_EARLY, "\n", KILLS_A_STRANGER),
    "stale master": (
        "keeper",
        "        k->master = 0; /* a reaped number may be somebody else's next */\n",
        "",
        KILLS_A_STRANGER,
    ),
    "stale server": ("keeper", "            k->servers[i] = 0;\n", "", KILLS_A_STRANGER),
    "no phases": ("keeper", "table[i].phase != k->phase", "false", "not so"),
    "no counts": ("keeper", "k->uses[i]++ >= table[i].times", "false", "more often than allowed"),
    "not judged": ("keeper", "policy_plan(l, &q->plan)", "ERR_OK", "not so"),
    "not granted": (
        "policy",
        "names_granted_caps(l) & l->permitted",
        "l->permitted",
        "no capability that was not granted",
    ),
    "sets of their own": (
        "policy",
        "l->flow == FLOW_SETUID && !fakeroot && !whole_grant(plan)",
        "false",
        "no capability that was not granted",
    ),
    "not recorded": ("keeper", "if (!known && audit_launch", "if (false && audit_launch", "record"),
    "any image": ("keeper", "!S_ISREG(image.st.st_mode)", "false", "an image is a file"),
    "raised for good": ("keeper", "    privs_lower(raised);\n", "", "not so"),
    "not dropped": ("keeper", "if (privs_drop(&target) < 0)", "if (false)", "has no rights"),
    "layer by its path": (
        "layers",
        'char name[48] = "";\n    append_fd(name, sizeof(name), fd);',
        "char name[48] = APY_SESSIONDIR;\n    (void)fd;",
        "a layer is named by a descriptor",
    ),
    "image by its path": (
        "layers",
        "append_fd(all, sizeof(all), these->lowers[i]);",
        "append_text(all, sizeof(all), APY_SESSIONDIR);",
        "a layer is named by a descriptor",
    ),
    "a longer number": (
        "network_rules",
        "return found == end || *found < '0' || *found > '9';",
        "return true;",
        "a rule of somebody else's stays",
    ),
    "a chain of all": (
        "network_rules",
        ' || begins(name, end, "CNI-HOSTPORT-")',
        "",
        "what all share stays",
    ),
}
OTHERS = {"layers": "fuzz_rpc", "network_rules": "fuzz_rules"}


@pytest.mark.parametrize("name", WEAKENED)
def test_the_place_of_each_such_hole_is_there(name: str) -> None:
    file, sound, _, _ = WEAKENED[name]
    assert sound in (STARTER / f"{file}.c").read_text()


@pytest.mark.long
@pytest.mark.parametrize("name", WEAKENED)
def test_the_fuzzers_find_a_hole_that_is_made_for_them(tmp_path, name: str) -> None:
    file, sound, weak, finding = WEAKENED[name]
    fuzzer = OTHERS.get(file, "fuzz_keeper")
    shutil.copytree(STARTER, tmp_path / "starter")
    (tmp_path / "tests/starter").mkdir(parents=True)
    for part in (f"{fuzzer}.c", "fuzz.h"):
        shutil.copy(HERE / part, tmp_path / "tests/starter")
    changed = tmp_path / f"starter/{file}.c"
    changed.write_text(changed.read_text().replace(sound, weak))
    sources = [tmp_path / f"tests/starter/{fuzzer}.c"]
    sources += [tmp_path / "starter" / other for other in FUZZERS[fuzzer]]
    program = tmp_path / fuzzer
    # A hole may leave something unused behind.
    flags = [flag for flag in FLAGS if flag != "-Werror"]
    argv = ["gcc", *flags, "-w", *map(str, sources), "-o", str(program)]
    subprocess.run(argv, check=True)
    done = subprocess.run([program, "7", "200000"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert finding in done.stderr, done.stderr[:400]
