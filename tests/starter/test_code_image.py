"""The bundles in stagehost.so hold the very code that compiling the package makes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = ("master", "image", "start", "oci")

# Run by the interpreter whose structures the images have; the loaded objects are its own then.
COMPARE = """
import ctypes, sys
from pathlib import Path
from types import CodeType
sys.path.insert(0, "tools")
import gen_frozen

class Bundle(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("size", ctypes.c_ssize_t), ("image", ctypes.c_void_p)]

def same(one, other):
    assert type(one) is type(other), (one, other)
    if type(one) is tuple:
        assert len(one) == len(other), (one, other)
        for pair in zip(one, other):
            same(*pair)
    elif type(one) is CodeType:
        for name in dir(one):
            if name[:3] == "co_" and name not in ("co_lines", "co_positions", "co_lnotab"):
                same(getattr(one, name), getattr(other, name))
        assert list(one.co_lines()) == list(other.co_lines())
        assert one == other
    else:
        assert one == other and hash(one) == hash(other) and repr(one) == repr(other)

stage, order = sys.argv[1], ("MASTER", "IMAGE", "START", "OCI")
host = ctypes.PyDLL("build/stagehost.so")
host.bundle_load.restype = ctypes.py_object
bundles = (Bundle * len(order)).in_dll(host, "bundles")
bundle = bundles[order.index(stage.upper())]
assert bundle.image, "no image was made"
loaded = host.bundle_load(ctypes.byref(bundle))
tree = gen_frozen.Tree(Path("."))
master = tree.bundle(gen_frozen._BUNDLES["master"], [])
names = tree.bundle(gen_frozen._BUNDLES[stage], master if stage == "image" else [])
same(loaded, tuple((name, tree.sources[name][1], tree.code(name)) for name in names))
print(len(loaded))
"""


@pytest.mark.parametrize("stage", STAGES)
def test_an_image_is_what_unmarshalling_would_give(stage):
    command = ["/usr/bin/python3", "-I", "-B", "-X", "no_debug_ranges", "-c", COMPARE, stage]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
