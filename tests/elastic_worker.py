"""Save with this many processes, and resume what other numbers of processes have saved.

Usage under torchrun: elastic_worker.py FOLDER. One launch of each world covers every ZeRO stage in
fp32. What the worlds before have left in ``FOLDER/saved`` is resumed, restored state and all; then
this world's own uninterrupted run is saved there.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "tests"))

from tiny_config import config  # noqa: E402

from sra_fast.data.dataset import make_dataset  # noqa: E402
from sra_fast.training import saving  # noqa: E402
from sra_fast.training.loop import train  # noqa: E402
from sra_fast.training.plan import make_plan  # noqa: E402
from sra_fast.training.snapshot import flats_by_kind  # noqa: E402
from sra_fast.training.trainer import build  # noqa: E402
from sra_fast.zero.process_group import init_distributed  # noqa: E402

STAGES = (0, 1, 2, 3)
SAVED = 2
# the batch can be divided by 1, 2 and 3; eps as in zero_worker.py
ARGS = (
    f"--train.steps 4 --train.save_every {SAVED} --train.log_every 1 --train.global_batch 12 "
    "--train.precision fp32 --optim.eps 1e-5 --optim.lr 0.003 --train.ema_decay 0.9"
)


def state_of(trainer) -> dict:
    """Every kind in whole, and the weights that the student computes with."""
    masters = trainer.masters
    kinds = {kind: masters.gather(flats) for kind, flats in flats_by_kind(trainer).items()}
    counts = [float(state["step"]) for state in masters.optimizer_states()]
    return {**kinds, "counts": counts}


def build_stage(stage: int, device):
    cfg = config(*ARGS.split(), "--train.zero_stage", str(stage))
    return build(make_plan(cfg), device), make_dataset(cfg)


def resume(device, source: Path, stage: int, folder: Path) -> dict:
    trainer, data = build_stage(stage, device)
    progress = saving.load(trainer, source / f"checkpoints/step_{SAVED:08d}")
    restored = state_of(trainer)
    folder.mkdir(parents=True, exist_ok=True)
    rows = train(trainer, data, folder, progress.step)
    return {"restored": restored, "final": state_of(trainer), "loss": [row["loss"] for row in rows]}


def main() -> None:
    out = Path(sys.argv[1])
    device = init_distributed()
    world = dist.get_world_size()
    rank = dist.get_rank()
    earlier = sorted((out / "saved").glob("world*_stage*"))
    results = {}
    for stage in STAGES:
        trainer, data = build_stage(stage, device)
        folder = out / f"saved/world{world}_stage{stage}"
        folder.mkdir(parents=True, exist_ok=True)
        rows = train(trainer, data, folder)
        results[f"whole_{stage}"] = {
            "loss": [row["loss"] for row in rows],
            "final": state_of(trainer),
        }
        results[f"same_{stage}"] = resume(device, folder, stage, out / f"again/{world}_{stage}")
    # every stage of the worlds before in another stage here, so that all pairs of stages occur
    for i, source in enumerate(earlier):
        stage = STAGES[(i + 1 + world) % 4]
        folder = out / f"again/{world}_from_{source.name}"
        results[f"from_{source.name}"] = {"stage": stage, **resume(device, source, stage, folder)}
    if rank == 0:
        torch.save(results, out / f"results_{world}.pt")
    dist.barrier()


if __name__ == "__main__":
    main()
