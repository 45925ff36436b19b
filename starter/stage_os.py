"""The module `os` of a stage: the system calls, paths and file names that a launch needs.

The real one builds a mapping for the environment, which brings twenty-five abstract classes with
it and takes two milliseconds in each stage. Whoever asks for more than this gets the real one: its
source is then run over this module.
"""

import builtins
import posix
import posixpath as path
import sys
from posix import *

name = "posix"
linesep = "\n"
sep = "/"
altsep = None
extsep = "."
pathsep = ":"
curdir = "."
pardir = ".."
defpath = "/bin:/usr/bin"
devnull = "/dev/null"
sys.modules["os.path"] = path


def fsencode(filename):
    """Return a file name as bytes: UTF-8, and whatever else came in comes out again."""
    filename = fspath(filename)
    return filename if isinstance(filename, bytes) else filename.encode("utf-8", "surrogateescape")


def fsdecode(filename):
    """Return a file name as text; the opposite of fsencode."""
    filename = fspath(filename)
    return filename if isinstance(filename, str) else filename.decode("utf-8", "surrogateescape")


def makedirs(name, mode=0o777, exist_ok=False):
    """Make a directory and those above it."""
    above = path.dirname(name)
    if above and above != name and not path.exists(above):
        makedirs(above, exist_ok=True)
    try:
        mkdir(name, mode)
    except OSError:
        if not exist_ok or not path.isdir(name):
            raise


def __getattr__(wanted):
    if wanted.startswith("__"):
        raise AttributeError(wanted)
    own = globals()
    own.pop("__getattr__", None)
    version = sys.version_info
    # The core of the interpreter, which a stage begins with, has no sys.prefix yet.
    source = f"/usr/lib/python{version.major}.{version.minor}/os.py"
    with builtins.open(source, "rb") as file:
        exec(compile(file.read(), source, "exec"), own)
    try:
        return own[wanted]
    except KeyError:
        raise AttributeError(f"module 'os' has no attribute {wanted!r}") from None
