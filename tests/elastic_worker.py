"""Save with this many processes, and resume what other numbers of processes have saved.

Usage: elastic_worker.py FOLDER. One warm process forks each world, because importing everything
takes longer than the training. Each covers every ZeRO stage in fp32: its own uninterrupted run is
saved in ``FOLDER/world2_stage0``, and what the world before has saved is resumed.
"""

import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "tests"))

from bare_training import save, train  # noqa: E402
from launch import free_port  # noqa: E402
from tiny_config import config  # noqa: E402

from sra_fast.checkpoint.manifest import Progress  # noqa: E402
from sra_fast.data.dataset import make_dataset  # noqa: E402
from sra_fast.plots import report  # noqa: E402
from sra_fast.training import run_folder, saver, saving, store_averages  # noqa: E402
from sra_fast.training.host_copy import flats_by_kind  # noqa: E402
from sra_fast.training.plan import make_plan  # noqa: E402
from sra_fast.training.run_lock import token_in  # noqa: E402
from sra_fast.training.trainer import build  # noqa: E402
from sra_fast.utils.collectives import gathered  # noqa: E402
from sra_fast.zero.process_group import init_distributed  # noqa: E402

# the last one only resumes
WORLDS = (2, 1, 3)
STAGES = (0, 1, 2, 3)
SAVED = 2
# the batch can be divided by 1, 2 and 3; eps as in zero_worker.py
ARGS = (
    f"--train.steps 4 --train.save_every {SAVED} --train.log_every 1 --train.global_batch 12 "
    "--train.precision fp32 --optim.eps 1e-5 --optim.lr 0.003 --train.ema_decay 0.9 "
    '--train.averages {"slow":{"decay":0.8},"wide":{"sigma_rel":0.1}}'
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
    rows = train(trainer, data, folder, progress)
    return {"restored": restored, "final": state_of(trainer), "loss": [row["loss"] for row in rows]}


def failing_saves(trainer, folder: Path) -> dict:
    """Saves that fail on the last rank only; what every rank is told, and what is left."""
    last = dist.get_world_size() - 1
    told = {}

    def full(name):
        if name == "file_half" and dist.get_rank() == last:
            raise OSError(28, "No space left on device", "/disk/file")

    def broken(name):
        # before the ranks have told each other anything
        if name == "copied" and dist.get_rank() == last:
            raise KeyError("planted")

    save(trainer, folder, Progress(1), 0)
    for case, hook, value in (
        ("full", full, 0.0),
        ("broken", broken, 0.0),
        ("nan", lambda name: None, float("nan")),
    ):
        place = trainer.masters.segments[-1].of(trainer.masters.flats)[-1:]
        before = place.clone()
        if dist.get_rank() == last:
            place += value
        saver.at_phase = hook
        background = saver.Saver(trainer, folder)
        background.save(Progress(2), 0)
        background.close()
        saver.at_phase = lambda name: None
        place.copy_(before)
        error = background.error
        told[case] = gathered(f"{type(error).__name__}: {error}")
        told["parents"] = gathered(background.parent)
    dist.barrier()
    told["left"] = sorted(path.name for path in folder.iterdir())
    return told


def failing_snapshots(trainer, run: Path) -> list[list[str]]:
    """What every rank is told of snapshots that fail on the last rank only, for two errors."""
    told = []
    write_pieces = store_averages.write_pieces
    for error in (OSError(28, "No space left on device", "/disk/file"), KeyError("planted")):

        def failing(path, pieces, error=error):
            if dist.get_rank() == dist.get_world_size() - 1:
                raise error
            return write_pieces(path, pieces)

        store_averages.write_pieces = failing
        told.append(said_by_all(lambda: store_averages.store(trainer, run, 4)))
    store_averages.write_pieces = write_pieces
    return told


def failing_folder(out: Path) -> list[str]:
    """What every rank is told where rank 0 makes no folder, by a fault of the program."""
    make_numbered = run_folder._make_numbered
    # only rank 0 calls it
    run_folder._make_numbered = None
    told = said_by_all(lambda: run_folder.new_folder(out))
    run_folder._make_numbered = make_numbered
    return told


def said_by_all(work: Callable) -> list[str]:
    """The error that each rank gets from some work."""
    try:
        work()
        said = "nothing"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return gathered(said)


def damaged_choice(run: Path) -> list[str]:
    """What every rank is told of a run whose newest checkpoint has a flipped bit in a file that the
    last rank looks at.
    """
    rank = dist.get_rank()
    file = run / f"checkpoints/step_{2 * SAVED:08d}/rank_00001.safetensors"
    if rank == 0:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    dist.barrier()
    with run_folder.opened(run.parent, run / f"checkpoints/step_{2 * SAVED:08d}") as opened:
        said = [opened.choice.path.name, *opened.choice.remarks]
    return gathered(said)


def unshared(run: Path) -> list[str]:
    """What every rank is told where the last one has a file system of its own."""
    if dist.get_rank() == dist.get_world_size() - 1:
        run_folder.token_in = lambda folder: token_in(folder.parent / "another")
        run_folder.LATE = 0.0
    try:
        with run_folder.opened(run, None):
            said = "nothing"
    except ValueError as error:
        said = str(error)
    run_folder.token_in = token_in
    messages = gathered(said)
    # the lock was given back
    with run_folder.opened(run, None) as opened:
        messages.append(opened.folder.name)
    return messages


def one_world(out: Path) -> None:
    """What each process of a world does."""
    torch.set_num_threads(1)
    device = init_distributed()
    world = dist.get_world_size()
    results = {}
    for stage in STAGES if world != WORLDS[-1] else ():
        trainer, data = build_stage(stage, device)
        folder = out / f"world{world}_stage{stage}"
        folder.mkdir(parents=True, exist_ok=True)
        rows = train(trainer, data, folder)
        loss = [row["loss"] for row in rows]
        results[f"whole_{stage}"] = {"loss": loss, "final": state_of(trainer)}
    if world == 2:
        results["failing"] = failing_saves(trainer, out / "failing")
        results["failing_snapshots"] = failing_snapshots(trainer, out / "failing")
        results["failing_folder"] = failing_folder(out / "failing")
        run = out / "damaged"
        if dist.get_rank() == 0:
            shutil.copytree(folder, run)
        results["damaged"] = damaged_choice(run)
        results["unshared"] = unshared(out / "unshared")
    # every stage of the world before in another stage here
    for before in WORLDS[: WORLDS.index(world)][-1:]:
        for stage in STAGES:
            source = out / f"world{before}_stage{stage}"
            folder = out / f"world{world}_from_{stage}"
            other = (stage + world) % len(STAGES)
            results[f"from_{stage}"] = resume(device, source, other, folder)
    results["imported"] = "torch._inductor.compile_fx" in sys.modules
    if dist.get_rank() == 0:
        torch.save(results, out / f"results_{world}.pt")
    dist.barrier()


def main() -> None:
    out = Path(sys.argv[1])
    # nobody looks at the curves of these runs, and drawing them takes longer than training
    report.plot_loss = lambda *args: None
    for world in WORLDS:
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
                os.environ.update(group, LOCAL_WORLD_SIZE=str(world))
                os.environ.update({name: str(value) for name, value in ranks.items()})
                code = 1
                try:
                    one_world(out)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    # not the parent's exit handlers
                    os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            sys.exit(f"the processes of world {world} ended with {codes}")


if __name__ == "__main__":
    main()
