"""How fast packed latents come from the page cache, and how long a training step waits for them.

python benchmarks/loader.py --images 131072 --batch 32 --workers 0 2 4 --step_ms 60
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sra_fast.data.latents import PackedLatents  # noqa: E402
from sra_fast.data.order import ShuffledBatches, make_loader  # noqa: E402
from sra_fast.data.writer import PackingJob, run_job  # noqa: E402


class Noise:
    """Random moments with labels, not written anywhere."""

    vae, fingerprint = None, "noise"

    def __init__(self, count: int, shape: tuple[int, ...]):
        self.labels = torch.arange(count) % 1000
        self.block = torch.from_numpy(
            np.random.default_rng(0).random((256, *shape), dtype=np.float32)
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]):
        return self.block[: len(indices)], self.labels[indices]


def packed(folder: Path, count: int, side: int) -> PackedLatents:
    """``count`` images of ``side`` pixels in ``folder``, made if they are not there: 16 KB each at 256 px."""
    shape = (8, side // 8, side // 8)
    job = {
        "version": 1,
        "layout": "packed",
        "source_sha256": "noise",
        "num_images": count,
        "num_classes": 1000,
        "shape": [*shape],
        "vae": None,
        "shard_size": 8192,
        "dtype": "float16",
    }
    encode = lambda moments: moments
    run_job(PackingJob(Noise(count, shape), encode, job, folder, batch=256, threads=1))
    return PackedLatents(str(folder))


def start_loader(data: PackedLatents, batch: int, workers: int, steps: int):
    order = ShuffledBatches(len(data), 0, batch, 1, 0, 1, 0, steps)
    return iter(make_loader(data, order, workers, torch.cuda.is_available()))


def latents_per_second(data: PackedLatents, batch: int, workers: int, steps: int) -> float:
    """Of one process that does nothing else, from the first batch on (loader processes start before)."""
    loader = start_loader(data, batch, workers, steps + 1)
    next(loader)
    start = time.perf_counter()
    for _ in loader:
        pass
    return steps * batch / (time.perf_counter() - start)


def waits(data: PackedLatents, batch: int, workers: int, steps: int, step_ms: float) -> list[float]:
    """Milliseconds that each step of ``step_ms`` waited for its batch, the first one left out; sorted."""
    loader, found = start_loader(data, batch, workers, steps), []
    for _ in range(steps):
        start = time.perf_counter()
        next(loader)
        found.append(1e3 * (time.perf_counter() - start))
        time.sleep(step_ms / 1e3)
    return sorted(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=131072, help="in the data set that is made")
    parser.add_argument("--side", type=int, default=256, help="of the images, in pixels")
    parser.add_argument("--batch", type=int, default=32, help="images per process and step")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2, 4])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--step_ms", type=float, default=60, help="pretended length of a step")
    parser.add_argument("--folder", type=Path, help="keeps the data set; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        data = packed(args.folder or Path(temporary) / "packed", args.images, args.side)
        for entry in data.entries:  # into the page cache
            (data.root / entry["file"]).read_bytes()
        for workers in args.workers:
            rate = latents_per_second(data, args.batch, workers, args.steps)
            wait = waits(data, args.batch, workers, min(args.steps, 200), args.step_ms)
            print(
                f"{workers} loader processes: {rate:8.0f} latents/s; a step of {args.step_ms:.0f} ms waits "
                f"{statistics.median(wait):.2f} ms (median), {wait[int(0.99 * len(wait))]:.2f} ms (99th percentile)"
            )


if __name__ == "__main__":
    main()
