"""What is loaded before anything is done: every module here is milliseconds of every launch."""

from __future__ import annotations

import subprocess

# What each costs is in the design notes; all of them together are more than a launch.
HEAVY = {
    "argparse",
    "asyncio",
    "contextlib",
    "ctypes",
    "dataclasses",
    "enum",
    "inspect",
    "json",
    "logging",
    "pathlib",
    "re",
    "shutil",
    "socket",
    "ssl",
    "subprocess",
    "tempfile",
    "typing",
}


def loaded_by(repository, *modules: str) -> set[str]:
    """Return the modules that the system's Python has loaded after importing some of ours."""
    script = f"import sys; sys.path.insert(0, {str(repository)!r})\n"
    script += "".join(f"import {name}\n" for name in modules)
    script += "print(*sys.modules)"
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-S", "-B", "-c", script],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


# What waits for a network anyway: commands load it, and no launch of an image of this machine.
SLOW = (
    "apptainer_py.builds.artifacts",
    "apptainer_py.builds.libraries",
    "apptainer_py.builds.remote",
    "apptainer_py.builds.uris",
    "apptainer_py.cache.",
    "apptainer_py.registry.",
    "apptainer_py.verbs.cache",
    "apptainer_py.verbs.keyserver",
    "apptainer_py.verbs.library",
    "apptainer_py.verbs.pull",
    "apptainer_py.verbs.push",
    "apptainer_py.verbs.registry",
    "apptainer_py.verbs.remote",
)


def test_no_module_loads_anything_heavy_when_it_is_imported(repository):
    names = [
        ".".join(path.relative_to(repository).with_suffix("").parts)
        for path in sorted((repository / "apptainer_py").rglob("*.py"))
        if path.name not in ("__init__.py", "__main__.py")
    ]
    names = [name for name in names if not name.startswith(SLOW)]
    assert len(names) > 10
    assert not loaded_by(repository, *names) & HEAVY


# What the two interpreters of a launch load: the stage host's entry, the parser, the engine.
LAUNCH = ("apptainer_py.cli.stage", "apptainer_py.cli.parse", "apptainer_py.engines.apptainer")
MODULES_MAX = 90


def test_a_launch_loads_few_modules_and_no_package_of_others(repository):
    loaded = loaded_by(repository, *LAUNCH)
    assert len(loaded) <= MODULES_MAX, sorted(loaded)
    ours = {name for name in loaded if name.split(".")[0] == "apptainer_py"}
    assert not {name.split(".")[1] for name in ours if "." in name} & {"verbs"}
