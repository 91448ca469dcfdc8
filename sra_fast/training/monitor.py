"""Samples of the EMA during training: a picture and, if asked for, their Fréchet distance, made by all processes together."""

import json
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sra_fast.config.schema import Config
from sra_fast.data.vae import decode, load_vae
from sra_fast.evaluation.adm_suite import summarize_reference
from sra_fast.evaluation.extractors import Extractor, inception_extractor
from sra_fast.evaluation.scores import RunningGaussian, frechet_distance
from sra_fast.plots import report
from sra_fast.sampling.generate import choose_labels, generate
from sra_fast.training.logger import read_rows
from sra_fast.training.trainer import Trainer
from sra_fast.utils.files import write_atomic


def gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """``[counts[rank], ...]`` of every rank -> all of them on each, in the order of the ranks; collective."""
    if len(counts) == 1:
        return rows
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    everyone = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyone, padded)
    return torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)])


class Monitor:
    """Looks at the EMA every ``monitor.every`` steps.

    Args:
        cfg: configuration.
        device: of this process.
        folder: run folder: ``samples/step_XXXXXXXX.png`` and ``samples.jsonl`` go there.

    Raises:
        ValueError: no VAE, weights or reference at the given paths.
    """

    def __init__(self, cfg: Config, device: torch.device, folder: Path):
        m = cfg.monitor
        self.cfg, self.device, self.folder = cfg, device, folder
        self.vae = load_vae(m.vae, cfg.model.in_channels).to(device) if m.vae else None
        self.extractor: Extractor | None = None
        if m.reference:
            self.extractor = inception_extractor(m.inception, device)
            self.reference = summarize_reference(m.reference, self.extractor, m.batch).pool

    @torch.no_grad()
    def look(self, trainer: Trainer, step: int) -> dict | None:
        """Sample after ``step``; collective.  The scores on rank 0, None elsewhere."""
        cfg, m, world, rank = self.cfg, self.cfg.monitor, trainer.world, trainer.rank
        model = cfg.model.build().to(self.device).eval()
        model.load_state_dict(trainer.state_dict(trainer.ema.full()))
        bounds = [m.count * r // world for r in range(world + 1)]
        counts, first = [b - a for a, b in pairwise(bounds)], bounds[rank]
        labels = choose_labels(m.count, cfg.model.num_classes, cfg.sample.labels, cfg.train.seed)[
            first : bounds[rank + 1]
        ]
        latents = generate(
            model,
            labels,
            cfg.sample,
            cfg.diffusion.path,
            cfg.train.seed,
            m.batch,
            self.device,
            first=first,
        )
        images = report.to_uint8(
            decode(latents, self.vae, cfg.data.latent_scale, m.batch, self.device),
            cfg.sample.rounding,
        )
        pixels = torch.from_numpy(images).to(self.device)
        scores = {"step": step, "images": m.count}
        if self.extractor is not None:
            features = [
                self.extractor(part.permute(0, 3, 1, 2).contiguous()).pool
                for part in pixels.split(m.batch)
            ]
            moments = RunningGaussian()
            moments.update(gather_rows(torch.cat(features), counts))
            scores["fid"] = frechet_distance(moments.gaussian(), self.reference)
        shown = gather_rows(pixels, counts)[: m.grid].cpu().numpy()
        if rank:
            return None
        (self.folder / "samples").mkdir(exist_ok=True)
        report.save_grid(
            self.folder / "samples" / f"step_{step:08d}.png",
            shown,
            10,
            4 if shown.shape[1] < 32 else 1,
        )
        file = self.folder / "samples.jsonl"
        rows = [
            row for row in read_rows(file) if row["step"] < step
        ]  # those of an interrupted run beyond here are made again
        write_atomic(
            file, lambda p: p.write_text("".join(json.dumps(row) + "\n" for row in [*rows, scores]))
        )
        return scores
