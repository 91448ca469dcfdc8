"""Samples of the EMA during training, made by all processes: a picture and, on request, their
FID.
"""

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
    """Rows ``[counts[rank], ...]`` of every rank, in the order of the ranks, on each;
    collective.
    """
    if len(counts) == 1:
        return rows
    # all_gather takes equal shapes only
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
        ValueError: no VAE, Inception weights or FID reference at the given paths.
    """

    def __init__(self, cfg: Config, device: torch.device, folder: Path):
        monitor = cfg.monitor
        self.cfg = cfg
        self.device = device
        self.folder = folder
        self.vae = None
        if monitor.vae:
            self.vae = load_vae(monitor.vae, cfg.model.in_channels).to(device)
        self.extractor: Extractor | None = None
        if monitor.reference:
            self.extractor = inception_extractor(monitor.inception, device)
            reference = summarize_reference(monitor.reference, self.extractor, monitor.batch)
            self.fid_reference = reference.pool

    def picture(self, step: int) -> Path:
        """Where the picture of a step is."""
        return self.folder / "samples" / f"step_{step:08d}.png"

    @torch.no_grad()
    def look(self, trainer: Trainer, step: int) -> dict | None:
        """Sample after ``step`` optimizer steps; collective.

        Returns:
            The scores on rank 0, None elsewhere.
        """
        monitor = self.cfg.monitor
        world = trainer.plan.world
        # this rank's share of the images, and everyone's
        bounds = [monitor.count * rank // world for rank in range(world + 1)]
        counts = [end - begin for begin, end in pairwise(bounds)]
        pixels = self._sample(trainer, bounds[trainer.rank], bounds[trainer.rank + 1])

        scores = {"step": step, "images": monitor.count}
        if self.extractor is not None:
            scores["fid"] = self._fid(pixels, counts)
        shown = gather_rows(pixels, counts)[: monitor.grid].cpu().numpy()
        if trainer.rank:
            return None
        file = self.picture(step)
        file.parent.mkdir(exist_ok=True)
        scale = 4 if shown.shape[1] < 32 else 1
        report.save_grid(file, shown, columns=10, scale=scale)
        self._log(scores)
        return scores

    def _sample(self, trainer: Trainer, first: int, end: int) -> Tensor:
        """Images ``first`` to ``end`` of the EMA, uint8 ``[n, H, W, C]`` on the device;
        collective.
        """
        cfg = self.cfg
        # another network: the student's weights must not change, and stage 3 partitions them
        model = cfg.model.build().to(self.device).eval()
        model.load_state_dict(trainer.state_dict(trainer.ema.full()))
        # the labels of all images: an image does not depend on the rank that makes it
        labels = choose_labels(
            cfg.monitor.count, cfg.model.num_classes, cfg.sample.labels, cfg.train.seed
        )
        batch = cfg.monitor.batch
        latents = generate(
            model,
            labels[first:end],
            cfg.sample,
            cfg.diffusion.path,
            cfg.train.seed,
            batch,
            self.device,
            first=first,
        )
        data = cfg.data
        images = decode(latents, self.vae, data.latent_scale, data.latent_shift, batch, self.device)
        return torch.from_numpy(report.to_uint8(images, cfg.sample.rounding)).to(self.device)

    def _fid(self, pixels: Tensor, counts: list[int]) -> float:
        """Fréchet distance of all ranks' images to the FID reference; collective."""
        features = [
            self.extractor(part.permute(0, 3, 1, 2).contiguous()).pool
            for part in pixels.split(self.cfg.monitor.batch)
        ]
        moments = RunningGaussian()
        moments.update(gather_rows(torch.cat(features), counts))
        return frechet_distance(moments.gaussian(), self.fid_reference)

    def _log(self, scores: dict) -> None:
        """Append a row to ``samples.jsonl``."""
        file = self.folder / "samples.jsonl"
        # an interrupted run may have been further: its later rows are made again
        rows = [row for row in read_rows(file) if row["step"] < scores["step"]]
        text = "".join(json.dumps(row) + "\n" for row in [*rows, scores])
        write_atomic(file, lambda p: p.write_text(text))
