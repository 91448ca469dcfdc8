"""Updates that are not finite, in every ZeRO stage, precision and optimizer: what they must not
change.

``check`` runs one case in this process group. Under torchrun, ``guard_worker.py`` runs all of them
on several processes, of which only the last has the bad gradient.
"""

import math
import shlex
import sys
from pathlib import Path

import torch
import torch.distributed as dist

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from sra_fast.config.cli import parse_train
from sra_fast.diffusion.micro_batch import MicroBatch, Times
from sra_fast.training.plan import make_plan
from sra_fast.training.trainer import Trainer, build
from sra_fast.utils.registry import CONDITIONINGS
from sra_fast.zero.process_group import init_distributed
from sra_fast.zero.teacher_weights import Fp8TeacherGroup

BATCH = 8
TINY = (
    "--model.name SiT-S/2 --model.input_size 8 --model.in_channels 1 --model.num_classes 10 "
    "--model.hidden_size 32 --model.depth 2 --model.num_heads 2 --align.student_layer 1 "
    f"--align.teacher_layer 2 --data.name digits --train.global_batch {BATCH} --optim.lr 0.01 "
    "--optim.weight_decay 0.1 --train.ema_decay 0.6 --train.steps 100 --train.graph false "
    "--train.averages '{slow: {decay: 0.7}, wide: {sigma_rel: 0.1}}'"
)
# name: (ZeRO stage, precision, further arguments); {micro} makes two micro-batches
CASES = {}
for stage in (0, 1, 2, 3):
    for implementation in ("fused", "torch"):
        optimizer = f"--optim.implementation {implementation}"
        for precision in ("fp32", "bf16"):
            name = f"{stage}-{precision}-{implementation}"
            CASES[name] = (stage, precision, f"{optimizer} --optim.clip 0.05")
        accumulated = f"{optimizer} --optim.clip 0 --train.micro_batch {{micro}}"
        if implementation == "fused" or stage in (1, 3):
            CASES[f"{stage}-accumulated-{implementation}"] = (stage, "bf16", accumulated)
        if stage == 1 or (stage == 2 and implementation == "fused"):
            # DeepSpeed keeps other gradients, and at stage 1 has another optimizer
            CASES[f"{stage}-fp32 sums-{implementation}"] = (stage, "bf16", accumulated)
        if stage == 1 or (stage in (0, 2) and implementation == "fused"):
            # steps so large that each changes the scales
            fp8 = f"{optimizer} --align.teacher_dtype fp8 --optim.lr 0.3"
            CASES[f"{stage}-fp8-{implementation}"] = (stage, "bf16", fp8)
CASES |= {
    "0-fp32-unclipped": (0, "fp32", "--optim.clip 0"),
    "0-no alignment": (0, "fp32", "--align none"),
    "1-no alignment": (1, "bf16", "--align none"),
    "1-fp32 teacher": (1, "bf16", "--align.teacher_dtype fp32"),
    "1-graph": (1, "bf16", "--train.graph true --train.micro_batch {micro}"),
    "0-graph": (0, "fp32", "--train.graph true"),
}
# what several processes may do otherwise: where the bad gradient is, and who knows of it
ON_SEVERAL = [
    *(f"{stage}-bf16-fused" for stage in (0, 1, 2, 3)),
    "0-fp32-torch",
    "1-fp32-torch",
    "3-accumulated-torch",
    "1-fp32 sums-fused",
    "1-fp8-fused",
    "1-graph",
]


def make(name: str, folder: Path, *more: str) -> Trainer:
    """The trainer of a case; ``more``: arguments of ``train.py``."""
    device = init_distributed()
    stage, precision, args = CASES[name]
    micro = BATCH // (2 * dist.get_world_size())
    words = f"{TINY} --train.zero_stage {stage} --train.precision {precision} "
    words += args.format(micro=micro)
    json = None
    if "fp32 sums" in name:
        json = folder / "ds.json"
        json.write_text('{"data_types": {"grad_accum_dtype": "fp32"}}')
    cfg = parse_train([*shlex.split(words), *more])[0]
    trainer = build(make_plan(cfg, json and str(json)), device)
    if trainer.graphed is not None:
        # the poison is a hook, which no replay would run
        trainer.graphed.graphs = False
    return trainer


class Poison:
    """Puts one value into one gradient of the last rank while it is on."""

    def __init__(self, trainer: Trainer, name: str):
        self.value: float | None = None
        self.last_rank = trainer.rank == dist.get_world_size() - 1
        parameter = dict(trainer.student.named_parameters())[name]
        parameter.register_hook(self._change)

    def _change(self, gradient: torch.Tensor) -> torch.Tensor | None:
        if self.value is None or not self.last_rank:
            return None
        changed = gradient.clone()
        changed.view(-1)[-1] = self.value
        return changed


def take_step(
    trainer: Trainer,
    position: int,
    teacher_runs: bool = True,
    poison: Poison | None = None,
    value: float = math.nan,
) -> None:
    """One optimizer step on the images of a position; the poison is in its first micro-batch."""
    conditioning = CONDITIONINGS[trainer.student.conditioning]
    weight = 0.0 if trainer.cfg.align.target == "none" else 0.2
    for micro_step in range(trainer.plan.accumulation):
        # drawn on the CPU: the same on every device
        torch.manual_seed((position * 100 + trainer.rank) * 100 + micro_step)
        micro = trainer.plan.micro
        x0, noise = torch.randn(2, micro, 1, 8, 8).to(trainer.device)
        labels = torch.randint(10, (micro,)).to(trainer.device)
        drop, uniform, gap = torch.rand(3, micro).to(trainer.device)
        condition = conditioning.from_tensor(labels).dropped(drop < 0.1)
        times = Times(*trainer.engine.module.process.times(uniform, gap))
        weights = [weight] * len(trainer.cfg.alignments)
        if poison is not None:
            poison.value = value if micro_step == 0 else None
        trainer.micro_step(MicroBatch(x0, condition, noise, times), weights, micro_step == 0)
        trainer.engine.step()
    if poison is not None:
        poison.value = None
    assert trainer.engine.was_step_applied()
    trainer.after_step(teacher_runs)
    if trainer.teacher is not None:
        trainer.teacher.wait()


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every tensor that an update may change, live, by name."""
    masters = trainer.masters
    found: dict[str, torch.Tensor] = {"updates": trainer.guard.counts[0]}
    for i, (flat, state) in enumerate(zip(masters.flats, masters.optimizer_states(), strict=True)):
        found[f"{i}.master"] = flat
        found |= {f"{i}.{key}": state[key] for key in ("exp_avg", "exp_avg_sq", "ema", "step")}
    for name, average in trainer.averages.items():
        found |= {f"{i}.{name}": flat for i, flat in enumerate(average.flats)}
    networks = {"student": trainer.student}
    if trainer.teacher is not None:
        networks["teacher"] = trainer.engine.module.teacher
    for kind, network in networks.items():
        for name, p in network.named_parameters():
            # at stage 3 this rank's partition
            found[f"{kind}.{name}"] = getattr(p, "ds_tensor", p).data
    for group in getattr(trainer.teacher, "groups", ()):
        found[f"{id(group)}.part"] = group.part
        if isinstance(group, Fp8TeacherGroup):
            tensors = ("multiplier", "held", "in_use", "amax", "scales")
            found |= {f"{id(group)}.{name}": getattr(group, name) for name in tensors}
    return found


def copy_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state_of(trainer).items()}


def put_back(trainer: Trainer, saved: dict[str, torch.Tensor]) -> None:
    for name, value in state_of(trainer).items():
        value.copy_(saved[name])


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not equal bit for bit."""
    as_bytes = lambda x: x.contiguous().view(-1).view(torch.uint8)
    return [name for name in one if not torch.equal(as_bytes(one[name]), as_bytes(other[name]))]


def check(
    name: str,
    folder: Path,
    value: float = math.nan,
    parameter: str = "blocks.1.mlp.fc1.weight",
) -> None:
    """One case: a bad update changes nothing, and what follows is what follows without it.

    Args:
        name: of the case.
        folder: for DeepSpeed's JSON.
        value: of one element of the gradient.
        parameter: whose gradient it is.

    Raises:
        AssertionError: something is not equal bit for bit.
    """
    trainer = make(name, folder)
    poison = Poison(trainer, parameter)
    # the first update of all, and the second in a row; then one after a good one
    for good, left_out in ((0, 1), (0, 2), (1, 3)):
        if good:
            take_step(trainer, 0)
        before = copy_of(trainer)
        take_step(trainer, 10 + left_out, poison=poison, value=value)
        changed = differences(before, copy_of(trainer))
        assert not changed, (name, value, changed)
        assert not trainer.guard.taken
        assert trainer.guard.counts.tolist() == [good, left_out, left_out - 2 * good]
        # beyond it the square of the norm overflows in fp32
        assert not float(trainer.grad_norm) < 1.85e19

    # a teacher that pauses, and a bad update after which it runs
    take_step(trainer, 2, teacher_runs=False)
    take_step(trainer, 3, poison=poison, value=value)
    take_step(trainer, 4)
    take_step(trainer, 5)
    with_bad = copy_of(trainer)
    assert trainer.guard.counts.tolist() == [4, 4, 0]
    moved = differences(before, with_bad)
    expected = ["master", "ema", "slow", "wide", *["multiplier", "in_use"] * ("fp8" in name)]
    assert all(any(kind in key for key in moved) for kind in expected), (name, moved)

    # the same gradients without the bad ones; the teacher that followed a bad update follows the
    # one before
    put_back(trainer, before)
    for position in (2, 4, 5):
        take_step(trainer, position)
    changed = differences(with_bad, copy_of(trainer))
    assert not changed, (name, value, changed)
    assert all(float(step) == 4 for key, step in with_bad.items() if key.endswith(".step"))
    trainer.engine.destroy()


def main() -> None:
    folder = Path(sys.argv[1])
    init_distributed()
    own = folder / f"rank{dist.get_rank()}"
    own.mkdir()
    for name in ON_SEVERAL:
        check(name, own)
        (own / name).touch()
    dist.barrier()


if __name__ == "__main__":
    main()
