"""Time of a whole training step, plain and with SRA, in this engine:  python benchmarks/train_step.py --model SiT-XL/2 --batch 32 256

Latents are random moments on the device; everything else is the training loop's own: draws, noising, student, teacher,
backward, DeepSpeed, clipping, AdamW, EMA, teacher refresh.  Every case runs in a process of its own, so that its peak memory
is its own and one that does not fit stops nothing.
"""
import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from record import RowFile, environment, make_row  # noqa: E402

VARIANTS = ("plain", "sra")
# student and teacher layer of the paper; other depths: a quarter and two thirds
LAYERS = {"SiT-B": (3, 8), "SiT-L": (6, 16), "SiT-XL": (8, 20), "DiT-B": (3, 7), "DiT-L": (6, 14), "DiT-XL": (8, 16)}


class RandomMoments:
    """One batch of VAE moments, given out for ever."""

    posterior = True

    def __init__(self, batch: int, shape: tuple[int, int, int], num_classes: int, device):
        channels, *sides = shape
        self.shape = shape
        self.batch = torch.rand(batch, 2 * channels, *sides, device=device), torch.arange(batch, device=device) % num_classes

    def to_latent(self, moments, noise):
        mean, std = moments.chunk(2, dim=1)
        return (mean + std * noise) * 0.18215


def configuration(args: argparse.Namespace, variant: str, batch: int):
    """The engine's configuration of one case; batches are per process, and there is one."""
    from sra_fast.engine.cli import parse_train

    family, depth = args.model.partition("/")[0], 12
    student, teacher = LAYERS.get(family, (depth // 4, depth * 2 // 3))
    return parse_train([
        "--model.name", args.model, "--model.input_size", str(args.resolution // 8), "--train.global_batch", str(batch),
        "--align.target", "none" if variant == "plain" else "ema_teacher", "--align.student_layer", str(student),
        "--align.teacher_layer", str(teacher), "--train.precision", "bf16" if args.device == "cuda" else "fp32",
        "--train.zero_stage", str(args.zero_stage), "--train.log_every", str(10**9), "--sample.method", "auto",
    ])[0]


def time_steps(step, warmup: int, steps: int, cuda: bool) -> float:
    """Median milliseconds of ``step(i)``."""
    for i in range(warmup):
        step(i)
    if not cuda:
        times = []
        for i in range(warmup, warmup + steps):
            start = time.perf_counter()
            step(i)
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for i in range(steps):
        step(warmup + i)
        events[i + 1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def measure(args: argparse.Namespace, variant: str, batch: int) -> dict:
    """The measured fields of one case, in this process."""
    from sra_fast.engine.build import build
    from sra_fast.engine.data import ShuffledBatches
    from sra_fast.engine.distributed import init_distributed
    from sra_fast.engine.loop import optimizer_step
    from sra_fast.engine.metrics import Metrics, peak_flops, training_flops

    device, cfg = init_distributed(), configuration(args, variant, batch)
    trainer = build(cfg, device)
    side = cfg.model.input_size
    data = RandomMoments(batch, (cfg.model.in_channels, side, side), cfg.model.num_classes, device)
    stream = ShuffledBatches(10**9, 0, batch, 1, 0, 1, 0, 10**6)
    metrics, batches = Metrics(None, cfg, device, 1), itertools.repeat(data.batch)
    trainer.engine.train()
    cuda = device.type == "cuda"
    ms = time_steps(lambda i: optimizer_step(trainer, batches, stream, data, i, metrics), args.warmup, args.steps, cuda)
    loss = float(metrics.sums["loss"][0])
    if not torch.isfinite(torch.tensor(loss)):
        raise FloatingPointError(f"the loss is {loss}: no time of a wrong step is reported")
    rate, flops, peak = 1e3 * batch / ms, training_flops(cfg), peak_flops(device, cfg.train.precision)
    return {
        "ms": ms,
        "images_per_s": rate,
        "mfu": rate * flops[0] / peak if peak else None,
        "mfu_with_teacher": rate * flops[1] / peak if peak else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


def run_case(argv: list[str], variant: str, batch: int, limit: float) -> dict | None:
    """``measure`` in a fresh process; None, with its last line printed, if it fails or takes longer than ``limit`` seconds."""
    command = [sys.executable, str(Path(__file__)), *argv, "--one", variant, str(batch)]
    on_cpu = parse(argv).device == "cpu"
    environ = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        print(f"{variant:6} batch {batch}: not finished in {limit:.0f} s")
        return None
    if done.returncode:
        print(f"{variant:6} batch {batch}: failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="SiT-XL/2")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256], help="images per GPU")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="of " + ", ".join(VARIANTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--time-limit", type=float, default=240, help="seconds for one case")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/<device>-<commit>.json")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    wrong = set(args.variants.split(",")) - set(VARIANTS)
    if wrong or min(args.batch) < 1 or args.steps < 1:
        parser.error(f"variants must be of {VARIANTS}, batches and steps at least 1, got {args.variants}, {args.batch}, {args.steps}")
    return args


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse(argv)
    if args.one:
        print(json.dumps(measure(args, args.one[0], int(args.one[1]))))
        return 0
    where = environment(args.device, "python benchmarks/train_step.py " + " ".join(argv))
    file, failed = RowFile(args.json, where), 0
    dtype = "bfloat16" if args.device == "cuda" else "float32"
    for batch in args.batch:
        first = None
        for variant in args.variants.split(","):
            fields = run_case(argv, variant, batch, args.time_limit)
            if fields is None:
                failed += 1
                continue
            file.add(make_row(kind="train_step", name="step", variant=variant, model=args.model, resolution=args.resolution,
                              batch=batch, dtype=dtype, **fields, **where))
            first = first or fields["ms"]
            print(f"{variant:6} {args.model} {args.resolution} px, {batch} images: {fields['ms']:.1f} ms, "
                  f"{fields['images_per_s']:.1f} images/s, {fields['ms'] / first:.3f} of the first variant's time")
    print(f"{len(file.rows)} rows in {file.path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
