"""Triton's interpreter, twice as fast and more for small kernels.

It replaces the functions of triton.language by its own at every launch, and again at every call of
a ``@triton.jit`` function inside the kernel, which took most of the time of such tests.
"""

from types import SimpleNamespace

from triton import language
from triton.runtime import interpreter

replace = interpreter._patch_lang
# as a kernel from whose module both can be seen
EVERYTHING = SimpleNamespace(__globals__={"tl": language, "core": language.core})


class Replaced(interpreter._LangPatchScope):
    """What a launch has replaced, until it ends."""

    is_in_place = False

    def restore(self) -> None:
        super().restore()
        Replaced.is_in_place = False


def replace_once(fn):
    """Replace everything when a kernel starts, and nothing when it calls a function."""
    if Replaced.is_in_place:
        return interpreter._LangPatchScope()
    scope = Replaced()
    scope._changes = replace(EVERYTHING)._changes
    Replaced.is_in_place = True
    return scope


def remember(np_dtype_of):
    """A function that makes a table of all dtypes at every call, called once for each."""
    known = {}

    def lookup(dtype):
        # blocks and pointers cannot be hashed
        name = dtype.scalar.name
        if name not in known:
            known[name] = np_dtype_of(dtype)
        return known[name]

    return lookup


def speed_up() -> None:
    """For the rest of this process."""
    interpreter._patch_lang = replace_once
    interpreter._get_np_dtype = remember(interpreter._get_np_dtype)
