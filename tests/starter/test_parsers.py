"""What the starter reads of a user's bytes, in C: built with ASan and UBSan, and fuzzed."""

from __future__ import annotations

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
    "fuzz_grants": (),
    "fuzz_image": ("report.c",),
    "fuzz_process": (),
    "fuzz_record": (),
    "fuzz_request": ("report.c",),
    "fuzz_rpc": ("report.c", "wire.c", "policy_mounts.c", *CONFIG),
}
# Iterations of about a second, and of a part of the minute that CI has for all of them.
SHORT = {
    "fuzz_bearer": 10_000,
    "fuzz_grants": 500_000,
    "fuzz_image": 100_000,
    "fuzz_process": 200_000,
    "fuzz_record": 300_000,
    "fuzz_request": 2_000_000,
    "fuzz_rpc": 50_000,
}
LONG = {
    "fuzz_bearer": 100_000,
    "fuzz_grants": 5_000_000,
    "fuzz_image": 300_000,
    "fuzz_process": 1_500_000,
    "fuzz_record": 3_000_000,
    "fuzz_request": 20_000_000,
    "fuzz_rpc": 400_000,
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
