"""One variant of a training step in this process: built, timed, taken apart into phases and kernels, and given back."""

import argparse
import contextlib
import gc
import itertools
import math
import os
import statistics
import time
from collections.abc import Iterator

import torch
from measure import copy_bandwidth, matmul_rate
from phases import Phases, by_family, kernel_times, recorded, time_host, time_steps
from programs import Program
from variants import REFERENCE, Variant

from sra_fast.config.schema import Config
from sra_fast.data.order import ShuffledBatches
from sra_fast.training.logger import TrainLogger, peak_flops, training_flops
from sra_fast.training.loop import optimizer_step
from sra_fast.training.plan import make_plan
from sra_fast.training.trainer import build, restore_linear
from sra_fast.utils.cuda_graph import hidden_bytes
from sra_fast.zero.process_group import init_distributed

# device memory that a case may leave to the next one of a process: what libraries keep for themselves
LEFT_BYTES = 1 << 28


class RandomMoments:
    """One batch of VAE moments, given out for ever; ``world`` processes share the configured batch."""

    posterior = True

    def __init__(self, cfg: Config, device: torch.device, world: int = 1):
        batch, channels, side = (
            cfg.train.global_batch // world,
            cfg.model.in_channels,
            cfg.model.input_size,
        )
        self.shape = (channels, side, side)
        generator = torch.Generator(device).manual_seed(0)
        moments = torch.rand(batch, 2 * channels, side, side, device=device, generator=generator)
        self.batch = moments, torch.arange(batch, device=device) % cfg.model.num_classes

    def to_latent(self, moments, noise):
        mean, std = moments.chunk(2, dim=1)
        return (mean + std * noise) * 0.18215


class EngineStep:
    """The engine's own step on one batch, from the draws to the teacher's refresh."""

    def __init__(self, cfg: Config, data: RandomMoments, device: torch.device):
        self.trainer = trainer = build(make_plan(cfg), device)
        self.data, self.batches = data, itertools.repeat(data.batch)
        self.stream = ShuffledBatches(
            10**9, 0, trainer.plan.micro, 1, trainer.rank, trainer.plan.world, 0, 10**6
        )
        self.metrics = TrainLogger(None, cfg, device, trainer.plan.world)
        trainer.engine.train()

    def step(self, i: int) -> None:
        optimizer_step(self.trainer, self.batches, self.stream, self.data, i, self.metrics)

    def close(self) -> None:
        """DeepSpeed keeps hooks on the parameters, which would keep the engine."""
        self.trainer.engine.destroy()

    @property
    def loss_sum(self) -> torch.Tensor:
        return self.metrics.sums["loss"][0]

    @property
    def phases(self) -> list[tuple[object, str, str]]:
        engine = self.trainer.engine
        if (
            self.trainer.graphed is not None
        ):  # inside one graph forward, teacher and backward cannot be told apart
            return [(self.trainer, "micro_step", "graph"), (engine, "step", "optimizer")]
        aligned = engine.module.teacher is not None
        teacher = [(engine.module.teacher_pass, "run", "teacher")] if aligned else []
        return [
            (engine, "forward", "forward"),
            *teacher,
            (engine, "backward", "backward"),
            (engine, "step", "optimizer"),
        ]


class ProgramStep(Program):
    """A program with the phases that its functions are."""

    @property
    def phases(self) -> list[tuple[object, str, str]]:
        if self.graphed is not None:
            return [(self, "graphed", "graph"), (self, "update", "optimizer")]
        # inside one graph of the compiler's the teacher cannot be told from the student
        teacher = [] if self.switches.compile == "whole" else [(self, "features", "teacher")]
        return [
            (self, "forward", "forward"),
            *teacher,
            (self, "backward", "backward"),
            (self, "update", "optimizer"),
        ]


def make_step(variant: Variant, cfg: Config, device: torch.device, reference: str | None):
    """What runs the variant: ``step(i)``, ``loss_sum`` and ``phases``."""
    data = RandomMoments(cfg, device)
    if variant.switches is not None:
        return ProgramStep(cfg, variant.switches, data, device)
    if variant.base == REFERENCE:
        from reference import Reference

        return Reference(cfg, reference, data, device)
    return EngineStep(cfg, data, device)


def rates(cfg: Config, device: torch.device, ms: float) -> dict:
    """Images and FLOP/s: ``mfu`` counts three passes of the student, ``mfu_with_teacher`` head and truncated teacher too."""
    rate, (plain, aligned) = 1e3 * cfg.train.global_batch / ms, training_flops(cfg)
    peak = peak_flops(device, cfg.train.precision, cfg.train.tf32)
    mfu = {"mfu": rate * plain / peak, "mfu_with_teacher": rate * aligned / peak} if peak else {}
    return {"images_per_s": rate, **mfu, "flops_per_s": rate * aligned}


def take_apart(run, first: int, steps: int, cuda: bool) -> dict:
    """Milliseconds per step of the families of kernels, of the longest kernels, and of the phases."""
    kernels, phases = kernel_times(run.step, range(first, first + steps), cuda), Phases(cuda)
    for place in run.phases:
        phases.around(*place)
    times, families = (
        phases.measure(run.step, range(first + steps, first + 2 * steps)),
        by_family(kernels),
    )
    # all of it, hidden behind the backward pass or not
    times["communication"] = families.get("communication", 0.0)
    return {
        "kernels": families,
        "longest": dict(itertools.islice(kernels.items(), 40)),
        "phases": times,
    }


@contextlib.contextmanager
def environment_of(variant: Variant) -> Iterator[None]:
    """The variant's variables, set while it is built and runs: operators read them when they are called or traced."""
    before = dict(os.environ)
    os.environ.update(variant.environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def handle(args: argparse.Namespace, request: list) -> dict:
    """The answer to one request of the parent's: the ceilings, or a variant of a case (model, resolution, batch)."""
    name, *case, profile = request
    if name == "ceilings":
        return ceilings(args.device)
    variant = Variant.parse(name)
    with environment_of(variant):
        return measure(args, variant, tuple(case), profile)


def release(cuda: bool) -> bool:
    """Give back what the last case held.  Whether the next one starts as in a new process: not if a kernel has broken the device's
    context, nor if memory is still held (a ZeRO-3 engine never goes)."""
    restore_linear()
    torch._dynamo.reset()
    gc.collect()
    if not cuda:
        return True
    try:
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.rand(1, device="cuda")  # fails for ever after a capture that has failed
    except RuntimeError:
        return False
    return torch.cuda.memory_allocated() <= LEFT_BYTES


def measure(
    args: argparse.Namespace, variant: Variant, case: tuple[str, int, int], profile: bool
) -> dict:
    """Everything that is measured of one variant of a case (model, resolution, batch), in this process."""
    cfg = variant.configuration(*case, args.device)
    device, begin = init_distributed(cfg.train.tf32), recorded(cuda=False)
    cuda = device.type == "cuda"
    # what earlier cases have left, next to nothing, is not this one's
    left = torch.cuda.memory_allocated() if cuda else 0
    run = make_step(variant, cfg, device, args.reference)
    try:
        return time_run(args, run, cfg, device, begin, left, profile)
    finally:
        getattr(run, "close", lambda: None)()


def time_run(
    args: argparse.Namespace,
    run,
    cfg: Config,
    device: torch.device,
    begin,
    left: int,
    profile: bool,
) -> dict:
    """Start-up since ``begin``, the median step, the host's, memory beyond what was ``left``, and where the time goes."""
    cuda = device.type == "cuda"
    time_steps(run.step, range(min(args.warmup, 1)), cuda)
    host = {"start-up": begin.elapsed_time(recorded(cuda=False))} if args.warmup else {}
    if args.untimed:
        time_steps(run.step, range(1, 2), cuda)
        return {}
    warm = time_steps(run.step, range(1, args.warmup), cuda)
    last = args.warmup + steps_within(args.seconds, args.steps, warm)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    when = time.time()
    ms = statistics.median(time_steps(run.step, range(args.warmup, last), cuda))
    found = {"ms": ms, "when": [when, time.time()], "host": host, **rates(cfg, device, ms)}
    found["peak_bytes"] = (
        torch.cuda.max_memory_allocated() + hidden_bytes() - left if cuda else None
    )
    if cuda:
        host["step"] = statistics.median(time_host(run.step, range(last, last + 5)))
    found["dtype"] = getattr(
        run, "dtype", {"bf16": "bfloat16", "fp32": "float32"}[cfg.train.precision]
    )
    found["loss"] = float(run.loss_sum)
    if not math.isfinite(found["loss"]):
        raise FloatingPointError(
            f"the loss is {found['loss']}: no time of a wrong step is reported"
        )
    if args.profile and profile:
        try:
            found |= take_apart(run, last + 5, args.profile, cuda)
        except (
            RuntimeError
        ) as error:  # the time is worth having on a machine that does not let itself be profiled
            found["note"] = f"neither phases nor kernels: {error}".partition("\n")[0]
    return found


def steps_within(seconds: float, steps: int, warm: list[float]) -> int:
    """How many steps are timed: all, or as many as the last one of the warm-up (in ms) allows, but 8."""
    if not warm or seconds == math.inf:
        return steps
    return min(steps, max(8, int(1e3 * seconds / warm[-1])))


def ceilings(device: str) -> dict:
    """What a copy and a matrix product reach: ``{name: [ms, GB/s or TFLOP/s]}``."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return {"copy": copy_bandwidth(device), "matmul": matmul_rate(device, dtype)}
