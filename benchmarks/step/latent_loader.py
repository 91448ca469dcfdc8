"""How fast packed latents come from the page cache, and how long a training step waits for them.

python -m benchmarks.step.latent_loader --images 131072 --batch 32 --workers 0 2 4 --step_ms 60
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from sra_fast.data.latents import PackedLatents
from sra_fast.data.loader import Batches
from sra_fast.data.order import ShuffledBatches
from sra_fast.data.training_data import TrainingData
from sra_fast.data.writer import PackingJob, run_job

# steps are real waits, so not all of them are repeated for the second measurement
WAITING_STEPS = 200


class NoiseSource(TrainingData):
    """Random moments with labels; nothing is read from disk.

    Args:
        count: number of images.
        shape: of an image's moments.
    """

    vae = None
    fingerprint = "noise"

    def __init__(self, count: int, shape: tuple[int, ...]):
        self.labels = torch.arange(count) % 1000
        # the same block for every batch: only packing and loading are to be measured
        block = np.random.default_rng(0).random((256, *shape), dtype=np.float32)
        self.block = torch.from_numpy(block)

    def __getitems__(self, indices: list[int]):
        return self.block[: len(indices)], self.labels[indices]


def packed_noise(folder: Path, count: int, side: int) -> PackedLatents:
    """A packed data set, written if the folder does not hold it: 16 KB per image at 256 px.

    Args:
        folder: of the data set.
        count: number of images.
        side: of the images, in pixels.
    """
    shape = (8, side // 8, side // 8)
    job = {
        "version": 2,
        "layout": "packed",
        "source_sha256": "noise",
        "num_images": count,
        "num_classes": 1000,
        "shape": [*shape],
        "vae": None,
        "shard_size": 8192,
        "dtype": "float16",
    }
    source = NoiseSource(count, shape)
    run_job(PackingJob(source, lambda moments: moments, job, folder, batch=256, threads=1))
    return PackedLatents(str(folder))


def start_loader(data: PackedLatents, batch: int, workers: int, steps: int) -> Batches:
    """``steps`` batches. The loader's processes start at once."""
    order = ShuffledBatches(len(data), 0, batch, 1, 0, 1, 0, steps)
    return Batches(data, order, workers, torch.cuda.is_available())


def latents_per_second(data: PackedLatents, batch: int, workers: int, steps: int) -> float:
    """Rate of a process that does nothing else, from the first batch on."""
    # one more: the first batch waits for the processes to start
    with start_loader(data, batch, workers, steps + 1) as loader:
        next(loader)
        begin = time.perf_counter()
        for _ in loader:
            pass
    return steps * batch / (time.perf_counter() - begin)


def sorted_waits(
    data: PackedLatents, batch: int, workers: int, steps: int, step_ms: float
) -> list[float]:
    """Milliseconds that each step of ``step_ms`` waits for its batch, without the first step, sorted."""
    found = []
    with start_loader(data, batch, workers, steps) as loader:
        for _ in range(steps):
            begin = time.perf_counter()
            next(loader)
            found.append(1e3 * (time.perf_counter() - begin))
            time.sleep(step_ms / 1e3)
    # without the first, which waits for the processes to start
    return sorted(found[1:])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--images", type=int, default=131072, help="of the data set (default 131072)")
    add("--side", type=int, default=256, help="of the images, in pixels (default 256)")
    add("--batch", type=int, default=32, help="images per process and step (default 32)")
    add("--workers", type=int, nargs="+", default=[0, 2, 4], help="loader processes")
    add("--steps", type=int, default=1000, help="default: 1000")
    add("--step_ms", type=float, default=60, help="pretended length of a step (default 60)")
    add("--folder", type=Path, help="keeps the data set; default: a temporary folder")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        data = packed_noise(args.folder or Path(temporary) / "packed", args.images, args.side)
        # into the page cache
        for entry in data.shards.entries:
            (data.root / entry["file"]).read_bytes()
        for workers in args.workers:
            rate = latents_per_second(data, args.batch, workers, args.steps)
            steps = min(args.steps, WAITING_STEPS)
            waits = sorted_waits(data, args.batch, workers, steps, args.step_ms)
            print(
                f"{workers} loader processes: {rate:8.0f} latents/s; "
                f"a step of {args.step_ms:.0f} ms waits {statistics.median(waits):.2f} ms (median), "
                f"{waits[int(0.99 * len(waits))]:.2f} ms (99th percentile)"
            )


if __name__ == "__main__":
    main()
