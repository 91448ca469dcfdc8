"""Triton's interpreter, about twice as fast.

It replaces the functions of triton.language by its own at every launch, and again at every call of
a ``@triton.jit`` function inside the kernel, which took half the time of a test.
"""

from types import SimpleNamespace

from triton import language
from triton.runtime import interpreter

# stands in for a kernel whose module sees all that is replaced
EVERYTHING = SimpleNamespace(__globals__={"tl": language, "core": language.core})
NOTHING_TO_RESTORE = SimpleNamespace(restore=lambda: None)


def once_per_launch(patch_lang):
    """A ``_patch_lang`` that replaces everything when a kernel starts, until it ends, and nothing
    when the kernel calls a function.
    """
    in_place = []

    def patch(fn):
        if in_place:
            return NOTHING_TO_RESTORE
        scope = patch_lang(EVERYTHING)
        restore = scope.restore

        def restore_all():
            restore()
            in_place.clear()

        scope.restore = restore_all
        in_place.append(scope)
        return scope

    return patch


def once_per_dtype(np_dtype_of):
    """``_get_np_dtype`` makes a table of all dtypes at every call."""
    known = {}

    def lookup(dtype):
        # blocks and pointers cannot be hashed
        name = dtype.scalar.name
        if name not in known:
            known[name] = np_dtype_of(dtype)
        return known[name]

    return lookup


def speed_up() -> None:
    """For the rest of this process; a Triton that cannot restore what it replaces stays slow."""
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = once_per_launch(interpreter._patch_lang)
        interpreter._get_np_dtype = once_per_dtype(interpreter._get_np_dtype)
