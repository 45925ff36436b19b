"""Builds what is not plain Python: generated files, the C programs and the Cython module.

    /usr/bin/python3 setup.py build_product --prefix P --sysconfdir S --output DIR

leaves in DIR: starter, starter-init, starter-monitor, apptainer-py, launcher, apptainer-py-oci,
stagehost.so, unpack.so, fusefd.so, main.py and package/apptainer_py, byte-compiled.
Nothing is installed here (./install does that); metadata and tool settings are in pyproject.toml.
"""

from __future__ import annotations

import hashlib
import os
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Command, find_packages, setup

SOURCE = Path(__file__).resolve().parent
PYTHON = "/usr/bin/python3"
GCC = "/usr/bin/gcc"
# For who builds often: objects come from ccache.
CACHE = ["/usr/bin/ccache"] if os.environ.get("APY_CCACHE") else []
# What is not the starter: other programs, and what only those share.
STARTER_INDEPENDENT = (
    *("launcher", "stagehost", "unpack", "fusefd", "fuzz", "test"),
    *("lean", "init", "process", "hook", "record", "relay", "monitor"),
)
LEAN_SHARED = ("launcher_request", "hook", "record", "relay", "steps")
INIT_SHARED = ("wire", "report", "process", "hook", "steps")
PARALLEL = 2

WARNINGS = """
-Wall -Wextra -Werror -Wconversion -Wshadow -Wstrict-prototypes -Wmissing-prototypes -Wvla
-Walloca -Wformat=2 -Wundef -Wswitch-enum -Wwrite-strings -Wnull-dereference -Wduplicated-cond
-Wduplicated-branches -Wlogical-op -Wcast-qual -Wimplicit-fallthrough=3
-Wframe-larger-than=8192
""".split()
HARDENING = """
-D_FORTIFY_SOURCE=3 -fstack-protector-strong -fstack-clash-protection -fcf-protection=full
-ftrivial-auto-var-init=zero -fzero-call-used-regs=used-gpr -fno-strict-overflow
-fno-delete-null-pointer-checks
""".split()
# glibc asks the processor some hundred questions before main(), which a virtual machine answers in
# 0.4 ms; programs that run for less than that are linked with musl.
MUSL = sysconfig.get_config_var("MULTIARCH").replace("gnu", "musl")
MUSL_HEADERS = Path("/usr/include") / MUSL
MUSL_LIBRARY = Path("/usr/lib") / MUSL
KERNEL_HEADERS = {
    "linux": Path("/usr/include/linux"),
    "asm-generic": Path("/usr/include/asm-generic"),
    "asm": Path("/usr/include") / sysconfig.get_config_var("MULTIARCH") / "asm",
}
LINK = ["-Wl,-z,relro,-z,now,-z,noexecstack,--as-needed"]
GENERATED_BY_TOOL = (
    ("gen_protocol.py", "starter/protocol.def", "apptainer_py/model/protocol.py"),
    ("gen_directives.py", None, "apptainer_py/model/directive_table.py"),
    ("gen_options.py", None, "starter/generated/options.h"),
    ("gen_api.py", None, "apptainer_py/api/keywords.pyi"),
)
GENERATED = (
    "apptainer_py/base/build.py",
    "starter/generated/build.h",
    *(target for _, _, target in GENERATED_BY_TOOL),
)
ABI_PROBE = """
#include <Python.h>
#include <stdio.h>
int main(void) { return printf("%#x %#lx\\n", PY_VERSION_HEX, Py_Version) < 0; }
"""
MAIN = '''\
#!/usr/bin/python3 -ISB
"""Starts the commands that need no container; run as `{python} -I -S -B main.py`."""

import atexit
import os
import sys

sys.path.insert(0, {libdir!r})

from apptainer_py.cli.main import main

status = main(sys.argv)
# To take the interpreter apart would cost milliseconds, and nothing is left in it.
atexit._run_exitfuncs()
for stream in (sys.stdout, sys.stderr):
    try:
        stream.flush()
    except OSError:
        pass
os._exit(status)
'''


def run(argv: list[str], **options: object) -> str:
    """Run a tool and return what it printed; its errors go to stderr and end the build."""
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False, **options)
    if done.returncode != 0:
        raise SystemExit(f"setup.py: failed ({done.returncode}): {' '.join(argv)}")
    return done.stdout


def write_if_changed(target: Path, text: str) -> None:
    """Write a generated file, leaving an equal one (and its date) alone."""
    if not target.exists() or target.read_text() != text:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


def version() -> str:
    """Return the version that apptainer_py/__init__.py names."""
    for line in (SOURCE / "apptainer_py/__init__.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise SystemExit("setup.py: apptainer_py/__init__.py names no version")


def sources() -> list[Path]:
    """Return every file that decides what the product is, generated ones left out."""
    kinds = {".c", ".h", ".def", ".py", ".pyx", ".pxd", ".pxi", ".pyi"}
    found = [SOURCE / "setup.py", *(SOURCE / "tools").glob("gen_*.py")]
    for folder in ("starter", "apptainer_py"):
        found += [path for path in (SOURCE / folder).rglob("*") if path.suffix in kinds]
    generated = {SOURCE / name for name in GENERATED}
    generated |= {path.with_suffix(".c") for path in (SOURCE / "apptainer_py").rglob("*.pyx")}
    return sorted(set(found) - generated)


def build_id(facts: dict[str, object]) -> str:
    """Return 32 hex digits that differ whenever two builds may not be mixed."""
    digest = hashlib.sha256(repr(sorted(facts.items())).encode())
    for path in sources():
        content = path.read_bytes()
        digest.update(f"{path.relative_to(SOURCE)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:32]


def product_facts(prefix: str, sysconfdir: str, *, setuid: bool) -> dict[str, object]:
    """Return every compiled-in name with its value, in the order in which they are written."""
    libexecdir = f"{prefix}/libexec/apptainer-py"
    library = sysconfig.get_config_var("INSTSONAME")
    facts: dict[str, object] = {
        "VERSION": version(),
        "PREFIX": prefix,
        "BINDIR": f"{prefix}/bin",
        "LIBEXECDIR": libexecdir,
        "LIBDIR": f"{prefix}/lib/apptainer-py",
        "SYSCONFDIR": sysconfdir,
        "CONFIG_FILE": f"{sysconfdir}/apptainer-py.conf",
        "CAPABILITY_FILE": f"{sysconfdir}/capability.json",
        "SESSIONDIR": f"{libexecdir}/session",
        "STARTER": f"{libexecdir}/starter",
        "STARTER_SUID": f"{libexecdir}/starter-suid",
        "STAGEHOST": f"{libexecdir}/stagehost.so",
        "PYTHON": PYTHON,
        "LIBPYTHON": f"{sysconfig.get_config_var('LIBDIR')}/{library}",
        "SOABI": sysconfig.get_config_var("SOABI"),
        "PYTHON_HEX": sys.hexversion,
        "SETUID": setuid,
    }
    return {"BUILD_ID": build_id(facts), **facts}


def c_header(facts: dict[str, object]) -> str:
    """Return build.h for these facts."""
    shown = {
        name: f'"{value}"' if isinstance(value, str) else int(value)
        for name, value in facts.items()
    }
    lines = [f"#define APY_{name} {value}" for name, value in shown.items()]
    guard = ["/* Generated by setup.py. */", "#ifndef APY_BUILD_H", "#define APY_BUILD_H"]
    return "\n".join([*guard, *lines, "#endif", ""])


def python_facts(facts: dict[str, object]) -> str:
    """Return apptainer_py/base/build.py for these facts."""
    lines = [
        f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value}"
        for name, value in facts.items()
    ]
    title = '"""What was compiled in; generated by setup.py."""'
    return "\n".join([title, "", "from __future__ import annotations", "", *lines, ""])


def generate(tree: Path, facts: dict[str, object]) -> None:
    """Write all generated files below a copy of the sources, or the sources themselves."""
    write_if_changed(tree / "starter/generated/build.h", c_header(facts))
    write_if_changed(tree / "apptainer_py/base/build.py", python_facts(facts))
    for tool, source, target in GENERATED_BY_TOOL:
        script = SOURCE / "tools" / tool
        if not script.exists() or (source and not (SOURCE / source).exists()):
            print(f"setup.py: no {source or script.name}: {target} is not made", file=sys.stderr)
            continue
        fresh = tree / f"{target}.fresh"
        fresh.parent.mkdir(parents=True, exist_ok=True)
        arguments = [SOURCE / source, fresh] if source else [fresh]
        run([PYTHON, "-I", "-B", str(script), *map(str, arguments)])
        write_if_changed(tree / target, fresh.read_text())
        fresh.unlink()


def accepted(flags: list[str], scratch: Path) -> list[str]:
    """Return those flags that this compiler knows; a newer one may know more, an older fewer."""
    empty = scratch / "probe.c"
    empty.write_text("int probe;\n")

    def known(flag: str) -> bool:
        probe = [GCC, "-std=gnu11", "-O2", "-Werror", flag, "-c", str(empty), "-o", "/dev/null"]
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0

    with ThreadPoolExecutor(PARALLEL) as pool:
        kept = [flag for flag, good in zip(flags, pool.map(known, flags), strict=True) if good]
    for flag in set(flags) - set(kept):
        print(f"setup.py: this compiler does not know {flag}", file=sys.stderr)
    return kept


class Compiler:
    """Compiles one staged tree into an output directory."""

    def __init__(self, tree: Path, output: Path) -> None:
        self.tree = tree
        self.output = output
        self.objects = output / "objects"
        self.cython_objects: list[str] = []
        self.objects.mkdir(exist_ok=True)
        self.hardening = accepted(HARDENING, self.objects)
        self.strict = [
            "-std=gnu11",
            "-O2",
            # Empty, as in the files that define it for themselves.
            "-D_GNU_SOURCE=",
            *accepted(WARNINGS, self.objects),
            *self.hardening,
        ]
        # Headers of others are not held to our warnings, hence -isystem.
        self.python = ["-isystem", sysconfig.get_path("include")]
        self.libpython = [f"-L{sysconfig.get_config_var('LIBDIR')}"]
        self.libpython += [f"-lpython{sysconfig.get_config_var('LDVERSION')}"]

    def _objects(self, names: list[Path], kind: str, flags: list[str]) -> list[str]:
        if not names:
            raise SystemExit(f"setup.py: there is no source for {kind}")
        made = [self.objects / f"{path.stem}.{kind}.o" for path in names]
        headers = [self.tree / "starter", self.tree / "starter/generated"]

        def compile_one(source: Path, target: Path) -> None:
            # No name says where the tree is: two builds of it are equal wherever they are made.
            include = [f"-I{os.path.relpath(folder, source.parent)}" for folder in headers]
            run(
                [*CACHE, GCC, *flags, *include, "-c", source.name, "-o", str(target)],
                cwd=source.parent,
            )

        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(compile_one, names, made))
        return list(map(str, made))

    def program(self, name: str, files: list[Path], *extra: str) -> None:
        """Build a position-independent program that needs libc only."""
        objects = self._objects(files, name, [*self.strict, "-fPIE", *extra])
        run([GCC, *self.hardening, "-pie", *LINK, *objects, "-o", str(self.output / name)])

    def static_program(self, name: str, files: list[Path], *extra: str) -> None:
        """Build a position-independent program that needs no library: nothing is loaded with it."""
        objects = self._objects(files, name, [*self.strict, "-fPIE", *extra])
        link = [GCC, *self.hardening, "-static-pie", *LINK]
        run([*link, *objects, "-o", str(self.output / name)])

    def brief_program(self, name: str, files: list[Path], *extra: str) -> None:
        """Build a program without libraries that becomes another within a millisecond."""
        headers = self.objects / "kernel"
        headers.mkdir(exist_ok=True)
        for link, target in KERNEL_HEADERS.items():
            (headers / link).unlink(missing_ok=True)
            (headers / link).symlink_to(target)
        where = run([GCC, "-print-file-name=include"]).strip()
        own = ["-nostdinc"]
        for folder in (str(MUSL_HEADERS), where, str(headers)):
            own += ["-isystem", folder]
        objects = self._objects(files, name, [*self.strict, "-fPIE", *own, *extra])

        def part(file: str) -> str:
            return run([GCC, f"-print-file-name={file}"]).strip()

        first = [str(MUSL_LIBRARY / "rcrt1.o"), str(MUSL_LIBRARY / "crti.o"), part("crtbeginS.o")]
        last = [str(MUSL_LIBRARY / "libc.a"), part("libgcc.a"), part("crtendS.o")]
        last.append(str(MUSL_LIBRARY / "crtn.o"))
        link = [GCC, "-static-pie", "-nostdlib", *LINK]
        run([*link, *first, *objects, *last, "-o", str(self.output / name)])

    def stage_host(self, files: list[Path]) -> None:
        """Build the object that starter's dropped children load: the only user of libpython.

        It holds the whole package, frozen, and the Cython module: a stage searches for nothing.
        """
        objects = self._objects(files, "stagehost", [*self.strict, "-fPIC", *self.python])
        frozen = self.objects / "frozen.c"
        script = SOURCE / "tools/gen_frozen.py"
        # Columns of the source, which only a traceback would show, are a fifth of the bytecode.
        run([PYTHON, "-I", "-B", "-X", "no_debug_ranges", str(script), str(self.tree), str(frozen)])
        objects += self._objects([frozen], "stagehost", ["-O0", "-fPIC", "-w", *self.python])
        objects += self.cython_objects
        target = str(self.output / "stagehost.so")
        run([GCC, *self.hardening, "-shared", *LINK, *objects, *self.libpython, "-o", target])

    def server_object(self, name: str, files: list[Path]) -> None:
        """Build an object that an image server loads: it needs libc only, and finds the rest."""
        flags = [*self.strict, "-fPIC", "-ftls-model=initial-exec"]
        objects = self._objects(files, name, flags)
        target = str(self.output / f"{name}.so")
        run([GCC, *self.hardening, "-shared", *LINK, *objects, "-o", target])

    def cython_module(self, source: Path) -> None:
        """Build the extension module beside its source; the C that Cython writes is not kept."""
        written = self.objects / f"{source.stem}.c"
        cython = [PYTHON, "-I", "-B", "-m", "cython", "-3", "-o", str(written)]
        run([*cython, str(source.relative_to(self.tree))], cwd=self.tree)
        # Cython describes each function by a code object, half of the module's start, that nothing
        # reads where functions are not bound (`binding=False`).
        unread = r"(?m)^(  __pyx_codeobj\w* = )\(PyObject ?\*\)__Pyx_PyCode_New\([^;]*\);"
        written.write_text(re.sub(unread, r"\1Py_NewRef(Py_None);", written.read_text()))
        # Cython's own C does not pass the warnings that hand-written C is held to.
        flags = ["-O2", "-fPIC", "-w", *self.hardening, *self.python]
        objects = self._objects([written], "module", flags)
        self.cython_objects += objects
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        target = str(source.with_name(source.stem + suffix))
        run([GCC, *self.hardening, "-shared", *LINK, *objects, "-o", target])

    def check_abi(self) -> None:
        """Refuse headers, libpython and interpreter that are not of one version.

        Debian's python3 is static, so its libpython is a package of its own and can lag behind.
        """
        probe = self.objects / "abi.c"
        probe.write_text(ABI_PROBE)
        program = str(self.objects / "abi")
        run([GCC, "-w", *self.python, str(probe), *self.libpython, "-o", program])
        headers, library = run([program]).split()
        if {headers, library} != {hex(sys.hexversion)}:
            raise SystemExit(
                f"setup.py: {PYTHON} is {sys.hexversion:#x}, its headers are {headers} and "
                f"libpython is {library}: bring them to one version with\n"
                f"  apt-get install --reinstall python3 libpython{sysconfig.get_python_version()}"
                f" libpython{sysconfig.get_python_version()}-dev"
            )


def byte_compile(package: Path, installed: str) -> None:
    """Write the .pyc files that every launch reads, naming the installed paths in tracebacks.

    Unchecked hash: the import then neither reads nor stats the source. It cannot go stale, because
    ./install replaces source and bytecode together and only root can write either. Written here,
    explicitly, so that PYTHONDONTWRITEBYTECODE in the administrator's environment changes nothing.
    """
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    for source in sorted(package.rglob("*.py")):
        shown = f"{installed}/{package.name}/{source.relative_to(package)}"
        py_compile.compile(str(source), dfile=shown, doraise=True, invalidation_mode=mode)


def stage_sources(tree: Path) -> None:
    """Copy what is compiled or installed to a place of its own, leaving generated files behind."""
    shutil.rmtree(tree, ignore_errors=True)
    unwanted = shutil.ignore_patterns("__pycache__", "generated", "*.so", "_*.c")
    for folder in ("starter", "apptainer_py"):
        if (SOURCE / folder).exists():
            shutil.copytree(SOURCE / folder, tree / folder, ignore=unwanted)
    for name in GENERATED:
        (tree / name).unlink(missing_ok=True)


class BuildProduct(Command):
    """Build everything for one prefix."""

    description = "build the starter, the launcher, the stage host and the package for a prefix"
    user_options = [
        ("prefix=", None, "where ./install will put it [/usr/local]"),
        ("sysconfdir=", None, "where the configuration will be [/etc/apptainer-py]"),
        ("output=", None, "directory for what is built [build]"),
        ("no-setuid", None, "for an installation without the setuid starter"),
        ("steps", None, "build starter-steps too, which tests can stop at every step"),
        ("inplace", None, "put generated files and the module into the source tree too"),
    ]
    boolean_options = ["no-setuid", "steps", "inplace"]

    def initialize_options(self) -> None:
        """Set the defaults."""
        self.prefix = "/usr/local"
        self.sysconfdir = "/etc/apptainer-py"
        self.output = str(SOURCE / "build")
        self.no_setuid = self.steps = self.inplace = False

    def finalize_options(self) -> None:
        """Refuse what cannot be compiled in."""
        for name in ("prefix", "sysconfdir"):
            value = getattr(self, name)
            plain = all(c.isalnum() or c in "/._+-" for c in value)
            if not value.startswith("/") or os.path.normpath(value) != value or not plain:
                raise SystemExit(f"setup.py: --{name} {value!r} is not a plain absolute path")
        if Path(sys.executable).resolve() != Path(PYTHON).resolve():
            raise SystemExit(f"setup.py: run me with {PYTHON}: the product runs with that one only")

    def run(self) -> None:
        """Build, in the order in which things need each other."""
        output = Path(self.output).resolve()
        output.mkdir(parents=True, exist_ok=True)
        facts = product_facts(self.prefix, self.sysconfdir, setuid=not self.no_setuid)
        tree = output / "package"
        stage_sources(tree)
        generate(tree, facts)
        if self.inplace:
            generate(SOURCE, facts)
        compiler = Compiler(tree, output)
        compiler.check_abi()
        for source in sorted((tree / "apptainer_py").rglob("*.pyx")):
            compiler.cython_module(source)
        self._compile(compiler, tree / "starter")
        if self.inplace:
            self._copy_modules(tree)
        byte_compile(tree / "apptainer_py", str(facts["LIBDIR"]))
        main = MAIN.format(python=PYTHON, libdir=facts["LIBDIR"])
        (output / "main.py").write_text(main)
        print(f"built {facts['VERSION']} {facts['BUILD_ID']} for {self.prefix} in {output}")

    def _compile(self, compiler: Compiler, folder: Path) -> None:
        files = sorted(folder.glob("*.c"))
        own = [path for path in files if not path.stem.startswith(STARTER_INDEPENDENT)]
        compiler.program("starter", own)
        if self.steps:
            compiler.program("starter-steps", own, "-DAPY_TEST_STEPS")
        launcher = [*sorted(folder.glob("launcher*.c")), folder / "subids.c"]
        compiler.brief_program("apptainer-py", launcher)
        compiler.program("launcher", launcher, "-DAPY_NAME_SERVICES")
        shared = [folder / f"{stem}.c" for stem in LEAN_SHARED]
        lean = [*sorted(folder.glob("lean*.c")), *shared]
        compiler.static_program("apptainer-py-oci", lean)
        if self.steps:
            compiler.static_program("apptainer-py-oci-steps", lean, "-DAPY_TEST_STEPS")
        compiler.static_program("starter-monitor", sorted(folder.glob("monitor*.c")))
        self._compile_init(compiler, folder)
        compiler.stage_host(sorted(folder.glob("stagehost*.c")))
        for name in ("unpack", "fusefd"):
            compiler.server_object(name, sorted(folder.glob(f"{name}*.c")))

    def _compile_init(self, compiler: Compiler, folder: Path) -> None:
        shared = [folder / f"{stem}.c" for stem in INIT_SHARED]
        files = [*sorted(folder.glob("init*.c")), *shared]
        compiler.static_program("starter-init", files)
        if self.steps:
            compiler.static_program("starter-init-steps", files, "-DAPY_TEST_STEPS")

    def _copy_modules(self, tree: Path) -> None:
        for module in (tree / "apptainer_py").rglob("*.so"):
            target = SOURCE / module.relative_to(tree)
            shutil.copy(module, f"{target}.fresh")
            os.replace(f"{target}.fresh", target)


setup(
    version=version(),
    packages=find_packages(include=["apptainer_py", "apptainer_py.*"]),
    cmdclass={"build_product": BuildProduct},
)
