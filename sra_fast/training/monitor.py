"""What is looked at during training, by all processes: samples as a picture and, on request, their
FID; and the held-out loss.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sra_fast.config.averages import POWER
from sra_fast.config.schema import Config
from sra_fast.data.training_data import TrainingData
from sra_fast.data.vae import decode, load_vae
from sra_fast.evaluation.adm_suite import summarize_reference
from sra_fast.evaluation.extractors import Extractor, inception_extractor
from sra_fast.evaluation.held_out import HeldOutImages, held_out_loss
from sra_fast.evaluation.scores import RunningGaussian, frechet_distance
from sra_fast.models import DiffusionTransformer
from sra_fast.plots import report
from sra_fast.sampling.conditions import SampleConditions, conditions_of, generate_for
from sra_fast.training.monitor_files import (
    HELD_OUT,
    SAMPLES,
    append_row,
    has_row,
    losses_of,
    picture_of,
)
from sra_fast.training.trainer import Trainer
from sra_fast.utils.collectives import gather_rows, share_of


class Monitor:
    """Looks at the weights ``sample.weights`` every ``monitor.every`` steps; at the EMA where these
    are ``power:SIGMA``, which are made at the end.

    Args:
        cfg: configuration.
        device: of this process.
        folder: run folder: ``samples/step_XXXXXXXX.png`` and ``samples.jsonl`` go there, and
            ``held_out/step_XXXXXXXX.npz`` and ``held_out.jsonl``.
        data: the training set: for the held-out loss, and for the captions that a model of text
            samples, which are the same in every look.

    Raises:
        ValueError: no VAE, Inception weights or FID reference at the given paths, or no held-out
            images where ``monitor.held_out`` asks for some.
    """

    def __init__(self, cfg: Config, device: torch.device, folder: Path, data: TrainingData):
        monitor = cfg.monitor
        self.cfg = cfg
        self.device = device
        self.folder = folder
        # an average of snapshots is made when training is over
        named = cfg.sample.weights
        self.weights = "ema" if named.startswith(POWER) else named
        self.vae = None
        if monitor.vae and monitor.count:
            self.vae = load_vae(monitor.vae, cfg.model.in_channels).to(device)
        self.normalization = data.facts().normalization
        self.extractor: Extractor | None = None
        if monitor.reference:
            self.extractor = inception_extractor(monitor.inception, device)
            reference = summarize_reference(monitor.reference, self.extractor, monitor.batch)
            self.fid_reference = reference.pool
        self.conditions: SampleConditions | None = None
        if monitor.count:
            # of all images: an image does not depend on the rank that makes it
            settings = (cfg.sample.labels, cfg.train.seed, cfg.model.num_classes)
            self.conditions = conditions_of(data, monitor.count, *settings)
            # read before the first step: an altered file must not stop a run in its middle
            self.captions = self.conditions.captions(monitor.grid)
        # the seed is not the run's: runs of all seeds are measured on the same images and noise
        self.held_out: HeldOutImages | None = None
        if monitor.held_out:
            self.held_out = HeldOutImages(data, monitor.held_out)

    def picture(self, step: int) -> Path:
        """Where the picture of a step is."""
        return picture_of(self.folder, step)

    def is_due(self, step: int) -> bool:
        """Whether the weights after ``step`` optimizer steps are looked at."""
        return step > 0 and step % self.cfg.monitor.every == 0

    def was_missed(self, trainer: Trainer, step: int) -> bool:
        """Whether the run goes on from a step that should have been looked at and was not: it was
        stopped or killed between checkpoint and look. Collective.
        """
        if not self.is_due(step):
            return False
        asked = {HELD_OUT: self.held_out is not None, SAMPLES: self.cfg.monitor.count > 0}
        files = [self.folder / name for name, wanted in asked.items() if wanted]
        # rank 0 writes them, and another machine may see them late
        answer = [trainer.rank == 0 and not all(has_row(file, step) for file in files)]
        if trainer.plan.world > 1:
            dist.broadcast_object_list(answer, src=0)
        return answer[0]

    @torch.no_grad()
    def look(self, trainer: Trainer, step: int) -> dict | None:
        """Look at the weights after ``step`` optimizer steps; collective.

        Returns:
            The scores on rank 0, None elsewhere.
        """
        # training's random numbers must not depend on whether somebody looks
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            # another network: the student's weights must not change, and stage 3 partitions them
            model = self.cfg.model.build().to(self.device).eval()
        model.load_state_dict(trainer.state_dict(trainer.weights(self.weights)))
        scores = {"step": step}
        if self.held_out is not None:
            scores |= self._measure(trainer, model, step)
        if self.cfg.monitor.count:
            scores |= self._sample(trainer, model, step)
        return None if trainer.rank else scores

    def _measure(self, trainer: Trainer, model: DiffusionTransformer, step: int) -> dict:
        """The held-out loss; collective, rank 0 writes."""
        loss = held_out_loss(
            model,
            self.cfg.diffusion.path,
            self.held_out,
            batch=self.cfg.monitor.batch,
            device=self.device,
            rank=trainer.rank,
            world=trainer.plan.world,
            about={"weights": self.weights, "step": step},
        )
        if trainer.rank == 0:
            file = losses_of(self.folder, step)
            file.parent.mkdir(exist_ok=True)
            loss.save(file)
            row = {"step": step, "mean": loss.mean(), "bins": loss.bins().tolist()}
            row |= {"weights": self.weights, "images": len(loss.images), "key": loss.key}
            append_row(self.folder / HELD_OUT, row)
        return {"held_out": loss.mean()}

    def _sample(self, trainer: Trainer, model: DiffusionTransformer, step: int) -> dict:
        """Samples and their scores; collective, rank 0 writes."""
        monitor = self.cfg.monitor
        world = trainer.plan.world
        shares = [share_of(monitor.count, rank, world) for rank in range(world)]
        counts = [len(share) for share in shares]
        pixels = self._generate(model, shares[trainer.rank])

        scores = {"images": monitor.count}
        if self.extractor is not None:
            scores["fid"] = self._fid(pixels, counts)
        shown = gather_rows(pixels, counts)[: monitor.grid].cpu().numpy()
        if trainer.rank == 0:
            file = self.picture(step)
            file.parent.mkdir(exist_ok=True)
            scale = 4 if shown.shape[1] < 32 else 1
            report.save_grid(file, shown, columns=10, scale=scale, captions=self.captions)
            append_row(self.folder / SAMPLES, {"step": step, **scores})
        return scores

    def _generate(self, model: DiffusionTransformer, share: range) -> Tensor:
        """Images of a share, uint8 ``[n, H, W, C]`` on the device."""
        cfg = self.cfg
        batch = cfg.monitor.batch
        settings = (cfg.sample, cfg.diffusion, cfg.train.seed, batch, self.device)
        latents = generate_for(model, self.conditions, share, *settings)
        images = decode(latents, self.vae, self.normalization, batch, self.device)
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
