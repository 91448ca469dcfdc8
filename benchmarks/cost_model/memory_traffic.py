"""Bytes that operators read and write, counted while they run on a CPU. Caches are left out."""

import contextlib
from collections.abc import Callable, Iterator
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from sra_fast import ops

# arguments that are written without being read, although their schema calls them mutable
WRITTEN_ONLY = {
    "copy_": ("self",),
    "_foreach_copy_": ("self",),
    "zero_": ("self",),
    "fill_": ("self",),
}
# arguments that are only read, although their schema calls them mutable
READ_ONLY = {"_fused_adamw_": ("grads",)}


def _tensors(value) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def tensor_bytes(value) -> int:
    """Bytes of all tensors in a nested value."""
    return sum(t.nbytes for t in _tensors(value))


def _storages(value) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in _tensors(value)}


class ByteCounter(TorchDispatchMode):
    """Counts in ``total`` the bytes that operators read and write."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.total += self.moved(func, args, kwargs, out)
        return out

    @staticmethod
    def moved(func, args, kwargs, out) -> int:
        """Bytes of one call: new outputs, arguments that are read, arguments that are written."""
        name = func._schema.name.split("::")[1]
        given = []
        for i, argument in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            given.append((argument, value))
        old = _storages([value for _, value in given])
        fresh = [t for t in _tensors(out) if not _storages(t) & old]
        mutable = [a.name for a, _ in given if a.alias_info and a.alias_info.is_write]
        # allocations touch nothing, and neither do views
        if "empty" in name or not (fresh or mutable):
            return 0
        total = tensor_bytes(fresh)
        for argument, value in given:
            reads = argument.name not in WRITTEN_ONLY.get(name, ())
            writes = argument.name in mutable and argument.name not in READ_ONLY.get(name, ())
            total += (reads + writes) * tensor_bytes(value)
        return total


@contextlib.contextmanager
def count_bytes() -> Iterator[ByteCounter]:
    """Counts what runs inside. ``ops.adamw_ema_`` counts as the one pass that its kernel is."""
    counter = ByteCounter()
    original = ops.adamw_ema_

    def one_pass(param, grad, exp_avg, exp_avg_sq, step, **rest):
        both_ways = [param, exp_avg, exp_avg_sq, rest.get("ema")]
        written = [rest.get("weights"), rest.get("ema_copy")]
        counter.total += tensor_bytes(grad) + 2 * tensor_bytes(both_ways) + tensor_bytes(written)
        # the reference that runs on a CPU takes many passes
        with _disable_current_modes():
            original(param, grad, exp_avg, exp_avg_sq, step, **rest)

    with patch.object(ops, "adamw_ema_", one_pass), counter:
        yield counter


def bytes_by_phase(run) -> dict[str, int]:
    """Bytes that ``backward`` and ``optimizer`` move in the second step of a run.

    The optimizer's phase lasts to the end of the step.

    Args:
        run: what ``steps.make_step`` returned.
    """
    places = {name: (owner, attribute) for owner, attribute, name in run.phases}
    run.step(0)
    found = {}
    originals = {}
    with contextlib.ExitStack() as stack:

        def counted_as(name: str, function: Callable) -> Callable:
            def wrapped(*args, **kw):
                found[name] = stack.enter_context(count_bytes())
                out = function(*args, **kw)
                # the optimizer's counter stays on until the end of the step
                if name == "backward":
                    stack.pop_all().close()
                return out

            return wrapped

        for name in ("backward", "optimizer"):
            owner, attribute = places[name]
            originals[name] = getattr(owner, attribute)
            setattr(owner, attribute, counted_as(name, originals[name]))
        run.step(1)
    for name, function in originals.items():
        owner, attribute = places[name]
        setattr(owner, attribute, function)
    return {name: counter.total for name, counter in found.items()}


def fuse_adamw(run) -> None:
    """Let the engine's ``torch.optim.AdamW`` run fused on a CPU too, as it does on a GPU."""
    if not hasattr(run, "trainer"):
        return
    for group in run.trainer.engine.optimizer.param_groups:
        if "fused" in group:
            group.update(fused=True, foreach=False)
