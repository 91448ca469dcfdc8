"""What a checkpoint costs a training run: how long it keeps a step, and how it slows the next ones.

python -m benchmarks.step.saving --batch 8 -- --model SiT-B/2 --train.precision fp32

Everything after ``--`` is configuration. The first save also allocates the memory that the others
use again.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.step.steps import EngineStep, OneBatch

# these rooms register what a configuration may name
from sra_fast import alignment, data, diffusion  # noqa: F401
from sra_fast.checkpoint.manifest import Progress
from sra_fast.config.cli import parse_train
from sra_fast.training.plan import fill_in
from sra_fast.training.saver import Saver
from sra_fast.zero.process_group import init_distributed


def measure(cfg, device: torch.device, folder: Path, saves: int, steps: int) -> dict:
    """Times of steps and saves.

    Args:
        cfg: configuration, filled in.
        device: to run on.
        folder: the checkpoints go there.
        saves: how many.
        steps: without a save, before the first.

    Returns:
        ``parameters``, ``bytes`` of a checkpoint, and in milliseconds ``step`` (median),
        ``blocked`` and ``written`` (one per save; until the commit), ``step_while_writing`` (mean).
    """
    run = EngineStep(cfg, OneBatch(cfg, device), device)
    saver = Saver(run.trainer, folder)
    done = 0

    def step() -> float:
        nonlocal done
        begun = time.perf_counter()
        run.step(done)
        if device.type == "cuda":
            torch.cuda.synchronize()
        done += 1
        return 1e3 * (time.perf_counter() - begun)

    # the first step warms everything up
    step()
    alone = [step() for _ in range(steps)]
    found = {"step": statistics.median(alone), "blocked": [], "written": []}
    beside = []
    for _ in range(saves):
        begun = time.perf_counter()
        saver.save(Progress(done), 0)
        found["blocked"].append(saver.blocked_ms)
        saved = done
        while saver.error is None and saver.parent != saved:
            beside.append(step())
        found["written"].append(1e3 * (time.perf_counter() - begun))
        saver.wait()
        if saver.error is not None:
            raise saver.error
    found["step_while_writing"] = statistics.mean(beside)
    found["parameters"] = sum(shape.numel() for shape in run.trainer.masters.shapes.values())
    newest = max(folder.glob("step_*"))
    found["bytes"] = sum(file.stat().st_size for file in newest.iterdir())
    run.close()
    return found


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="measured without a save")
    parser.add_argument("--out", help="folder for the checkpoints; default: a temporary one")
    parser.add_argument("rest", nargs="*", help="configuration, after --")
    asked = parser.parse_args(args)
    cfg, _ = parse_train([*asked.rest, "--train.global_batch", str(asked.batch)])
    fill_in(cfg)
    with tempfile.TemporaryDirectory(dir=asked.out) as folder:
        found = measure(cfg, init_distributed(), Path(folder), asked.saves, asked.steps)
    blocked = ", ".join(f"{ms:.0f}" for ms in found["blocked"])
    written = ", ".join(f"{ms:.0f}" for ms in found["written"])
    print(
        f"{cfg.model.name}, {found['parameters'] / 1e6:.1f} M parameters, "
        f"{found['bytes'] / 1e9:.2f} GB a checkpoint; a step takes {found['step']:.0f} ms, "
        f"{found['step_while_writing']:.0f} ms while one is written; "
        f"a save blocks {blocked} ms and is whole after {written} ms"
    )


if __name__ == "__main__":
    main()
