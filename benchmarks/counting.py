"""What needs no GPU: FLOPs of every variant of a step, and bytes that its optimizer moves:  python benchmarks/counting.py

FLOPs are those of the products, counted by torch's flop counter on tensors without data.  Bytes are counted by running a step of
a small model on the CPU: every tensor that an operator reads and every one that it writes, caches left out.  Its batch is so
small that weights and gradients are what the backward pass moves.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path[0:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from variants import Variant  # noqa: E402

from sra_fast import ops  # noqa: E402
from sra_fast.config.schema import Config  # noqa: E402


def counted(function, *args, **kw) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*args, **kw)
    return counter.get_total_flops()


def parts(cfg: Config) -> dict[str, int]:
    """Forward FLOPs per image of the student's parts, and of the two products whose input needs no gradient."""
    m = replace(cfg.model, depth=1)  # every block is alike
    with torch.device("meta"):
        student = m.build().eval()
        x, t, y = (
            torch.zeros(1, m.in_channels, m.input_size, m.input_size),
            torch.zeros(1),
            torch.zeros(1).long(),
        )
        token = torch.zeros(
            1, (m.input_size // student.x_embedder.proj.kernel_size[0]) ** 2, student.hidden_size
        )
        frequencies = torch.zeros(1, student.t_embedder.frequency_size)
    first = counted(student.x_embedder, x) + counted(student.t_embedder.mlp[0], frequencies)
    found = {
        "embed": counted(student.embed, x, t, y),
        "head": counted(student.ap_head, token),
        "first": first,
    }
    found["block"] = counted(student.features, x, t, y, depth=1) - found["embed"]
    found["final"] = counted(student.final_layer, token, token[:, 0])
    return found


def step_flops(cfg: Config, full_depth: bool = False) -> dict[str, Fraction]:
    """FLOPs per image of a training step: ``student`` (forward and backward, its head included) and ``teacher``, for the share
    of images and steps that are aligned.

    Args:
        cfg: model, layers and target are read.
        full_depth: whether the teacher runs to its last layer.
    """
    p, depth = parts(cfg), cfg.model.arguments()["depth"]
    forward = p["embed"] + depth * p["block"] + p["final"]
    if cfg.align.target == "none":
        return {"student": Fraction(3 * forward - p["first"]), "teacher": Fraction(0)}
    teacher = forward if full_depth else p["embed"] + cfg.align.teacher_layer * p["block"]
    share = Fraction(cfg.align.fraction).limit_denominator(1000) / cfg.align.every
    return {"student": 3 * forward + 3 * p["head"] * share - p["first"], "teacher": teacher * share}


VARIANTS = (
    "plain", "sra", "sra_fp8", "sra+optim.implementation=torch", "sra+align.fraction=0.5", "fp32_teacher", "bf16_teacher", "truncated",
    "strong",
)  # fmt: skip


# arguments that are written without being read, or only read, in spite of their schema
WRITTEN_ONLY = {
    "copy_": ("self",),
    "_foreach_copy_": ("self",),
    "zero_": ("self",),
    "fill_": ("self",),
}
READ_ONLY = {"_fused_adamw_": ("grads",)}


def size(value) -> int:
    return sum(t.nbytes for t in tree_leaves(value) if isinstance(t, Tensor))


class ByteCounter(TorchDispatchMode):
    """Bytes that operators read and write, in ``total``."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.total += self.moved(func, args, kwargs, out)
        return out

    @staticmethod
    def moved(func, args, kwargs, out) -> int:
        name, arguments = func._schema.name.split("::")[1], func._schema.arguments
        given = [
            (a, args[i] if i < len(args) else kwargs.get(a.name)) for i, a in enumerate(arguments)
        ]
        memory = lambda value: {
            t.untyped_storage().data_ptr() for t in tree_leaves(value) if isinstance(t, Tensor)
        }
        old = memory([value for _, value in given])
        fresh = [t for t in tree_leaves(out) if isinstance(t, Tensor) and not memory(t) & old]
        written = [a.name for a, _ in given if a.alias_info and a.alias_info.is_write]
        if "empty" in name or not (fresh or written):  # memory that nothing touches, and views
            return 0
        total = size(fresh)
        for argument, value in given:
            reads = argument.name not in WRITTEN_ONLY.get(name, ())
            writes = argument.name in written and argument.name not in READ_ONLY.get(name, ())
            total += (reads + writes) * size(value)
        return total


@contextlib.contextmanager
def count_bytes() -> Iterator[ByteCounter]:
    """Counts what runs inside; ``ops.adamw_ema_`` counts as the one pass that its kernel is."""
    counter, run = ByteCounter(), ops.adamw_ema_

    def one_pass(
        param, grad, exp_avg, exp_avg_sq, step, *, weights=None, ema=None, ema_copy=None, **rest
    ):
        counter.total += (
            size(grad) + 2 * size([param, exp_avg, exp_avg_sq, ema]) + size([weights, ema_copy])
        )
        with _disable_current_modes():
            run(
                param,
                grad,
                exp_avg,
                exp_avg_sq,
                step,
                weights=weights,
                ema=ema,
                ema_copy=ema_copy,
                **rest,
            )

    with patch.object(ops, "adamw_ema_", one_pass), counter:
        yield counter


def bytes_by_phase(run) -> dict[str, int]:
    """Bytes that ``backward`` and ``optimizer`` of the second step of ``run`` move; the optimizer's up to the end of the step."""
    places = {name: (owner, attribute) for owner, attribute, name in run.phases}
    run.step(0)
    found = {}
    with contextlib.ExitStack() as stack:

        def counted_as(name: str, function: Callable) -> Callable:
            def wrapped(*args, **kw):
                found[name] = stack.enter_context(count_bytes())
                out = function(*args, **kw)
                if name == "backward":
                    stack.pop_all().close()
                return out

            return wrapped

        originals = {}
        for name in ("backward", "optimizer"):
            owner, attribute = places[name]
            originals[name] = getattr(owner, attribute)
            setattr(owner, attribute, counted_as(name, originals[name]))
        run.step(1)
    for name, function in originals.items():
        setattr(*places[name], function)
    return {name: counter.total for name, counter in found.items()}


def fuse_adamw(run) -> None:
    """Let the engine's torch.optim.AdamW run fused on a CPU too, as it does on a GPU."""
    if hasattr(run, "trainer"):
        for group in run.trainer.engine.optimizer.param_groups:
            if "fused" in group:
                group.update(fused=True, foreach=False)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="SiT-XL/2")
    parser.add_argument("--resolution", type=int, default=256)
    args = parser.parse_args(argv)
    from step_case import make_step

    from sra_fast.zero.process_group import init_distributed

    device, plain = init_distributed(), None
    print(
        f"{args.model}, {args.resolution} px: GFLOP per image and step, times plain; bytes per parameter of update and backward"
    )
    for name in VARIANTS:
        variant = Variant.parse(name)
        full_depth = variant.switches is not None and not variant.switches.truncated
        flops = sum(
            step_flops(
                variant.configuration(args.model, args.resolution, 1, "cuda"), full_depth
            ).values()
        )
        small = variant.configuration("SiT-S/8", 64, 2, "cuda")
        run = make_step(variant, small, device, None)
        fuse_adamw(run)
        N, moved = sum(p.numel() for p in small.model.build().parameters()), bytes_by_phase(run)
        plain = plain or flops
        print(
            f"{name:30} {float(flops) / 1e9:9.1f} {float(flops / plain):7.3f} {moved['optimizer'] / N:7.1f} "
            f"{moved['backward'] / N:7.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
