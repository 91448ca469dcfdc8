"""Train a tiny SiT in every ZeRO stage and precision, interrupt, resume, and save the outcomes.

Usage under torchrun: zero_worker.py OUT_FOLDER. One launch covers all cases, because a launch costs
more than the training.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
sys.path.append(str(ROOT / "tests"))

from bare_training import train  # noqa: E402
from toy_text import MODEL as MMDIT  # noqa: E402
from toy_text import DigitsWithText  # noqa: E402

from sra_fast.checkpoint import sources  # noqa: E402
from sra_fast.checkpoint.manifest import Progress  # noqa: E402
from sra_fast.config.cli import parse_train  # noqa: E402
from sra_fast.data.dataset import check_data, fill_in_model, make_dataset  # noqa: E402
from sra_fast.data.digits import Digits  # noqa: E402
from sra_fast.plots import report  # noqa: E402
from sra_fast.training import saving  # noqa: E402
from sra_fast.training.monitor import Monitor  # noqa: E402
from sra_fast.training.plan import make_plan  # noqa: E402
from sra_fast.training.trainer import build  # noqa: E402
from sra_fast.zero.process_group import init_distributed  # noqa: E402

STEPS = 6
HALF = 3
# further configurations, each with its ZeRO stage; {micro} accumulates four micro-batches
VARIANTS = {
    "accumulated": (1, "--train.micro_batch {micro}"),
    "accumulated_decay_clip": (
        2,
        "--train.micro_batch {micro} --optim.weight_decay 0.5 --optim.clip 0.05",
    ),
    "accumulated_no_clip": (
        3,
        "--train.micro_batch {micro} --optim.clip 0 --optim.weight_decay 0.1",
    ),
    "plain": (2, "--align.target none"),
    "late_alignment": (
        1,
        '--align.schedule milestones --align.milestones {{"0":0.0,"2":0.4,"5":0.1}}',
    ),
    "stopped_alignment": (3, "--align.stop_at_step 2"),
    "cosine_warmup": (
        0,
        "--diffusion.path cosine --diffusion.time lognormal --align.distance cosine_patch "
        "--optim.warmup_steps 4",
    ),
    "no_null_class": (2, "--model.class_dropout_prob 0 --align.teacher_layer 4 --optim.clip 0.1"),
    "torch_adamw_0": (0, "--optim.implementation torch --optim.clip 0.1"),
    "torch_adamw_1": (1, "--optim.implementation torch --optim.clip 0.1"),
    "torch_adamw_2": (2, "--optim.implementation torch --train.micro_batch {micro}"),
    "torch_adamw_3": (3, "--optim.implementation torch"),
    "fraction_every": (2, "--align.fraction 0.3333333 --align.every 2 --train.micro_batch {micro}"),
    "compiled": (1, "--train.compile true --train.recompute norm"),
    "recompute_norm": (2, "--train.recompute norm"),  # after stage 3 has run in this process
    "recompute_full": (3, "--train.recompute full"),
    "monitored": (2, "--monitor.every 3 --monitor.count 5 --monitor.held_out 0 --sample.steps 2"),
    "monitored_loss": (
        3,
        "--monitor.every 3 --monitor.count 0 --monitor.held_out 40 --monitor.batch 16",
    ),
    "dit": (1, "--model.name DiT-S/2 --align.weight 0.04 --sample.method ddim"),
    # several processes add up their gradients after the backward pass, without DeepSpeed
    "graph_1": (1, "--train.graph true"),
    "graph_2": (
        2,
        "--train.graph true --train.micro_batch {micro} --optim.weight_decay 0.5 "
        "--optim.clip 0.05 --align.every 2",
    ),
    "graph_plain": (1, "--train.graph true --align.target none --train.micro_batch {micro}"),
    "mmdit_1": (1, f"{MMDIT} --model.qk_norm true --train.micro_batch {{micro}}"),
    "mmdit_3": (3, f"{MMDIT} --align.fraction 0.5 --align.teacher_layer 4 --train.recompute full"),
}
# every other alignment target, with the options that change what runs
_LAYER = "--align.student_layer 2"
_LAYERS = f"{_LAYER} --align.teacher_layer 3"
TARGETS = {
    "self_flow_0": (0, f"--align self_flow {_LAYERS} --align.fraction 0.5"),
    "self_flow_3": (3, f"--align self_flow {_LAYERS} --train.recompute full"),
    "dual_time_1": (1, f"--align dual_time {_LAYERS} --train.micro_batch {{micro}}"),
    "dual_time_2": (
        2,
        f"--align dual_time {_LAYERS} --align.full_share 0.3333333 --align.teacher_labels kept "
        "--align.stop_at_step 4",
    ),
    "dual_time_3": (3, f"--align dual_time {_LAYERS} --align.every 2 --train.recompute norm"),
    "dual_time_dit": (0, f"--model.name DiT-S/2 --align dual_time {_LAYERS} --sample.method ddim"),
    "vae_latent_1": (1, f"--align vae_latent {_LAYER} --align.every 2 --align.last_layer linear"),
    "vae_latent_3": (3, f"--align vae_latent {_LAYER}"),
    "repa_2": (
        2,
        f"--align cached_features {_LAYER} --align.feature_width 24 --align.head_width 64",
    ),
    "irepa_3": (
        3,
        f"--align cached_features {_LAYER} --align.head conv --align.target_norm spatial "
        "--align.feature_width 24 --align.fraction 0.5",
    ),
    "layer_sync_2": (2, f"--align layer_sync {_LAYER} --align.deep_layer 3"),
    "layer_sync_3": (3, f"--align layer_sync {_LAYER} --align.deep_layer 4 --align.fraction 0.5"),
    "dispersive_0": (0, f"--align dispersive {_LAYER} --align.over all"),
    "dispersive_3": (3, f"--align dispersive {_LAYER} --align.over all"),
    "mmdit_dual_time_2": (2, f"{MMDIT} --align dual_time {_LAYERS} --align.teacher_labels kept"),
    "mmdit_self_flow_0": (0, f"{MMDIT} --align self_flow {_LAYERS} --train.recompute norm"),
    "two_1": (1, f"--align self_flow {_LAYERS} --align2 vae_latent --align2.student_layer 1"),
    "two_3": (
        3,
        f"--align dual_time {_LAYERS} --align2 dispersive --align2.student_layer 3 "
        "--align2.over all --align2.stop_at_step 3",
    ),
}
# in bf16 as well
BF16 = {
    "bf16_dual_time_1": (1, f"--align dual_time {_LAYERS}"),
    "bf16_vae_latent_2": (2, f"--align vae_latent {_LAYER}"),
    "bf16_self_flow_3": (3, f"--align self_flow {_LAYERS}"),
    "bf16_graph_2": (2, "--train.graph true"),
    "bf16_graph_fp8": (
        1,
        "--train.graph true --align.teacher_dtype fp8 --align.every 2 --train.micro_batch {micro}",
    ),
}
FP8 = {  # in bf16
    "fp8_0": (0, "--align.teacher_dtype fp8"),
    "fp8_1": (1, "--align.teacher_dtype fp8"),
    "fp8_2": (2, "--align.teacher_dtype fp8 --align.every 2 --train.micro_batch {micro}"),
    "fp8_torch_0": (0, "--align.teacher_dtype fp8 --optim.implementation torch"),
    "fp8_torch_1": (1, "--align.teacher_dtype fp8 --optim.implementation torch"),
    "fp8_dual_time": (1, f"--align dual_time {_LAYERS} --align.teacher_dtype fp8"),
    "fp8_mmdit": (2, f"{MMDIT} --align.teacher_dtype fp8"),
    # steps so large that each changes the scales, resumed where the scales in use are not those of
    # the EMA
    "fp8_moving": (
        1,
        "--align.teacher_dtype fp8 --optim.lr 0.1 --train.ema_decay 0.2 --train.save_every 2",
    ),
    "fp8_moving_every": (
        2,
        "--align.teacher_dtype fp8 --optim.lr 0.1 --train.ema_decay 0.2 --train.save_every 4 "
        "--align.every 3",
    ),
}
CASES = [(stage, precision) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]
NAMES = [f"{precision}_{stage}" for stage, precision in CASES]
TORCH = [name for name in VARIANTS if name.startswith("torch_adamw")]
# compiling takes a process 36 s of CPU time, and compiled blocks know of no ranks
ONE_PROCESS = {"compiled"}
# alone, a process partitions and sends nothing: there is repeated what then runs other code, or
# what no run of plain PyTorch is compared with
BOTH = {
    *NAMES,
    *TORCH,
    "accumulated",
    "accumulated_decay_clip",
    "accumulated_no_clip",
    "monitored",
    "monitored_loss",
    *(name for name in FP8 if "moving" not in name),
    *BF16,
}


def runs(world: int) -> dict[str, tuple[int, str, str]]:
    """Stage, precision and arguments of every case that ``world`` processes run, by its name."""
    # snapshots after steps 4 and 6, which the resumed run makes once more
    snapshots = "--train.average_snapshots 4"
    every = {
        name: (stage, precision, snapshots)
        for name, (stage, precision) in zip(NAMES, CASES, strict=True)
    }
    for name, (stage, args) in {**VARIANTS, **TARGETS, **FP8, **BF16}.items():
        precision = "bf16" if name in {**FP8, **BF16} else "fp32"
        every[name] = (stage, precision, args.format(micro=24 // (4 * world)))
    here = BOTH | ONE_PROCESS if world == 1 else every.keys() - ONE_PROCESS
    return {name: case for name, case in every.items() if name in here}


# SRA's options: another target has other ones
ALIGN = "--align.student_layer 2 --align.teacher_layer 3 --align.weight 0.2"


def tiny(stage: int, precision: str, *args: str):
    """Four blocks of width 32 on digits.

    AdamW's eps is 1e-5. At 1e-8 it amplifies the rounding of gradients that are zero (the bias of
    the keys), and two correct programs differ by 1e-4 after six steps.
    """
    base = (
        "--model.name SiT-S/2 --model.input_size 8 --model.in_channels 1 --model.num_classes 10 "
        "--model.hidden_size 32 --model.depth 4 --model.num_heads 2 "
        "--data.name digits --optim.lr 0.003 --optim.eps 1e-5 "
        f"--train.steps {STEPS} --train.save_every {HALF} --train.log_every 1 "
        "--train.global_batch 24 --train.ema_decay 0.9 "
        '--train.averages {"slow":{"decay":0.8},"wide":{"sigma_rel":0.1}} '
        f"--train.zero_stage {stage} --train.precision {precision}"
    )
    align = () if "--align" in args else ALIGN.split()
    return parse_train([*base.split(), *align, *args])[0]


def gathered_teacher(trainer) -> dict:
    """The teacher's weights as this rank's forward sees them."""
    import deepspeed

    teacher = trainer.engine.module.teacher
    parameters = dict(teacher.named_parameters()) if teacher else {}
    modules = teacher.named_modules() if teacher else ()
    scales = {
        f"{name}.weight_scale": module.weight_scale
        for name, module in modules
        if hasattr(module, "weight_scale")
    }
    partitioned = trainer.plan.stage == 3
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=partitioned):
        return {name: p.detach().float().clone() for name, p in {**parameters, **scales}.items()}


def whole_masters(trainer) -> dict:
    """Every fp32 master in whole, by DeepSpeed's public accessor where there is one (ZeRO 1-3)."""
    from deepspeed.utils import safe_get_full_fp32_param

    named = dict(trainer.student.named_parameters())
    optimizer = trainer.engine.optimizer
    if trainer.plan.stage:
        return {
            name: safe_get_full_fp32_param(p).detach().cpu().clone() for name, p in named.items()
        }
    masters = {id(p): p for p in named.values()}
    for params, group in zip(
        getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=True
    ):
        masters.update({id(p): master for p, master in zip(params, group, strict=True)})
    return {name: masters[id(p)].detach().cpu().clone() for name, p in named.items()}


def watch_ema(trainer, history: list[dict]) -> dict:
    """Recompute the EMA of every whole parameter from whole masters in each step, which are added to
    ``history``.
    """
    ema = whole_masters(trainer)
    update = trainer.ema.update
    decay = trainer.cfg.train.ema_decay

    def update_both():
        update()
        history.append(whole_masters(trainer))
        for name, master in history[-1].items():
            ema[name] = decay * ema[name] + (1 - decay) * master

    trainer.ema.update = update_both
    return ema


# of the initial weights and those after each step, by the definitions: an exponential average, and the
# part of tau^gamma that falls on a step. sigma_rel 0.1 is gamma 6.94 (EDM2, Sec. 3.1)
SHARES = {
    "slow": [0.8**STEPS, *(0.2 * 0.8 ** (STEPS - i) for i in range(1, STEPS + 1))],
    "wide": [
        0.0,
        *((i**7.937 - (i - 1) ** 7.937) / STEPS**7.937 for i in range(1, STEPS + 1)),
    ],
}


def sum_of(shares: list[float], tensors: list) -> torch.Tensor:
    """The sum of tensors, each times its share, in fp64."""
    return sum(
        share * tensor.double() for share, tensor in zip(shares, tensors, strict=True)
    ).float()


class DigitsWithFeatures(Digits):
    """Digits with features of no model: each token's are a random projection of its image."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        projection = torch.randn(64, 16 * 24, generator=generator)
        features = (self.images.flatten(1) @ projection).view(-1, 16, 24)
        self.features = SimpleNamespace(facts=None, read=lambda indices: features[indices])


def dataset(cfg):
    """The configured data, with features if the target wants them."""
    if cfg.align.target == "cached_features":
        return DigitsWithFeatures()
    if cfg.model.conditioning == "text":
        data = DigitsWithText()
        fill_in_model(cfg, data)
        check_data(data, cfg)
        return data
    return make_dataset(cfg)


def outcome(trainer, rows) -> dict:
    masters = trainer.masters
    moments = {key: masters.gather(masters.state(key)) for key in ("exp_avg", "exp_avg_sq")}
    return {
        "master": masters.gather(masters.flats),
        "ema": trainer.ema.full(),
        "teacher": gathered_teacher(trainer),
        "ema_bytes": sum(flat.numel() * flat.element_size() for flat in trainer.ema.flats),
        **{f"average {name}": average.full() for name, average in trainer.averages.items()},
        "loss": [row["loss"] for row in rows],
        "grad_norm": [row["grad_norm"] for row in rows],
        **moments,
    }


def run_case(out: Path, name: str, device, stage: int, precision: str, *args: str) -> None:
    """Uninterrupted run; then one that is resumed from its middle; their outcomes go to ``out``."""
    cfg = tiny(stage, precision, *args)
    data = dataset(cfg)
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    trainer = build(make_plan(cfg), device)
    history: list[dict] = []
    # gathering all masters in each step is for those that are compared with them
    is_watched = name in (*NAMES, *TORCH)
    if is_watched:
        initial = whole_masters(trainer)
        watched = watch_ema(trainer, history)
    monitor = Monitor(cfg, device, folder, data) if cfg.monitor.every else None
    whole = outcome(trainer, train(trainer, data, folder, monitor=monitor))
    if is_watched:
        whole["watched_ema"] = watched
        whole["initial"] = initial
        whole["expected averages"] = {
            average: {key: sum_of(shares, [w[key] for w in (initial, *history)]) for key in initial}
            for average, shares in SHARES.items()
        }
    resumed = build(make_plan(cfg), device)
    first = cfg.train.save_every
    start = saving.load(resumed, folder / "checkpoints" / f"step_{first:08d}")
    assert start == Progress(first)
    second = outcome(resumed, train(resumed, data, folder, start))
    if name in NAMES:
        saving.export_published(resumed, out / f"{name}.published.pt", STEPS, 0)
        saving.export_safetensors(resumed, out / f"{name}.safetensors", STEPS, data.facts())
    torch.save({"whole": whole, "resumed": second}, out / f"{name}.rank{dist.get_rank()}.pt")
    dist.barrier()


def start_from_published(out: Path, device) -> None:
    """Import the .pt that stage 1 wrote, in every stage."""
    held = sources.read_weights(str(out / "fp32_1.published.pt"))
    for stage in (0, 1, 2, 3):
        trainer = build(make_plan(tiny(stage, "fp32")), device, weights=held["model"])
        step = saving.start_from(trainer, held)
        torch.save(
            {"step": step, **outcome(trainer, [])},
            out / f"imported_{stage}.rank{dist.get_rank()}.pt",
        )
    dist.barrier()


def main() -> None:
    out = Path(sys.argv[1])
    # loss.png takes longer than the steps
    report.plot_loss = lambda path, rows: None
    device = init_distributed()
    for name, (stage, precision, args) in runs(dist.get_world_size()).items():
        run_case(out, name, device, stage, precision, *args.split())
    start_from_published(out, device)


if __name__ == "__main__":
    main()
