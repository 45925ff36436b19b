"""The package `encodings` of a stage: UTF-8 at once, all others from the standard library.

The real package builds its table of three hundred aliases at every start, for which no launch has
a use; each stage would pay a millisecond.
"""

import codecs
import sys

from . import utf_8

# The core of the interpreter, which a stage begins with, has no sys.prefix yet.
__path__[:] = [f"/usr/lib/python{sys.version_info.major}.{sys.version_info.minor}/encodings"]
_ENTRY = utf_8.getregentry()


def search_function(name):
    """Return the codec of a name that the registry has normalised, or None."""
    if name in ("utf_8", "utf-8", "utf8"):
        return _ENTRY
    plain = "".join(c if c.isalnum() or c == "." else "_" for c in name)
    try:
        from encodings.aliases import aliases

        module = __import__("encodings." + aliases.get(plain, plain), fromlist=["getregentry"])
    except ImportError:
        return None
    return module.getregentry()


codecs.register(search_function)
