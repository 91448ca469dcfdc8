"""The published code's training step, from a checkout that the user names: its model and its loss in the loop it runs them in.

Nothing of it is copied here.  Its loop, on one GPU: fp16 autocast around the student's forward alone and a gradient scaler;
the teacher is the fp32 EMA, outside autocast, its products in TF32; clipping, AdamW as torch makes it, one pair of
kernels per tensor for the EMA; the host reads both losses every step.  In fp32 there is neither autocast nor scaler.
"""

import copy
import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from sra_fast.config.schema import Config

FILES = {"model": "SiT-SRA/models/sit.py", "loss": "SiT-SRA/loss.py"}
DISTANCES = {"smooth_l1": "sml1", "l1": "l1", "l2": "l2", "cosine_token": "cos"}


def load(checkout: str | None) -> dict[str, ModuleType]:
    """The modules of ``FILES``; ValueError if the checkout does not hold them, or needs a package that is missing."""
    if checkout is None:
        raise ValueError(
            "the variant reference needs --reference PATH: a checkout of the published code"
        )
    found = {}
    for name, file in FILES.items():
        path = Path(checkout) / file
        if not path.is_file():
            raise ValueError(
                f"--reference expects a checkout that holds {file}, found none at {path}"
            )
        spec = importlib.util.spec_from_file_location(f"published_{name}", path)
        found[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(found[name])
        except ModuleNotFoundError as error:
            raise ValueError(
                f"the published code needs the package {error.name}: pip install it"
            ) from None
    return found


class Reference:
    """Model, EMA, loss and one training step of the published code.

    Args:
        cfg: size, layers, distance, weight and optimizer are read; widths and depths are its own.
        checkout: folder of the published code.
        data: a data set of one endless batch.
        device: to run on.

    Raises:
        ValueError: not a checkout, or a configuration that it does not know.
    """

    def __init__(self, cfg: Config, checkout: str | None, data, device: torch.device):
        self.cfg, self.data, self.device, published = cfg, data, device, load(checkout)
        models = published["model"].SiT_models
        if cfg.model.name not in models or cfg.align.distance not in DISTANCES:
            raise ValueError(
                f"the published code has no {cfg.model.name} with distance {cfg.align.distance}"
            )
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.manual_seed(cfg.train.seed)
        sizes = {
            "input_size": cfg.model.input_size,
            "num_classes": cfg.model.num_classes,
            "use_cfg": True,
        }
        if cfg.model.name.startswith(
            "SiT-S"
        ):  # its S models leave the prediction layer at B's width, and cannot run
            sizes["decoder_hidden_size"] = cfg.model.arguments()["hidden_size"]
        self.model = models[cfg.model.name](**sizes, fused_attn=True, qk_norm=cfg.model.qk_norm).to(
            device
        )
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.model.train()
        self.criterion = published["loss"].SRALoss(
            block_out_s=cfg.align.student_layer, block_out_t=cfg.align.teacher_layer, t_max=cfg.align.t_max,
            loss_type=DISTANCES[cfg.align.distance],
        )  # fmt: skip
        o, self.half = cfg.optim, cfg.train.precision != "fp32"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=o.lr,
            betas=tuple(o.betas),
            eps=o.eps,
            weight_decay=o.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.half)
        self.dtype = "float16" if self.half else "float32"
        self.loss_sum = torch.zeros(())

    @property
    def phases(self) -> list[tuple[object, str, str]]:
        return [
            (self, "forward", "forward"), (self.ema, "forward", "teacher"), (self, "backward", "backward"),
            (self, "update", "optimizer"),
        ]  # fmt: skip

    def student(self, *args, **kw) -> tuple:
        """The model under autocast, its results in fp32: what accelerate makes of it."""
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            out = self.model(*args, **kw)
        return tuple(x.float() if x.is_floating_point() else x for x in out)

    def forward(self, x0: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        denoise, align = self.criterion(self.student, x0, self.ema, y)
        return denoise.mean(), align.mean() * self.cfg.align.weight

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def update(self) -> None:
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.optim.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        decay = self.cfg.train.ema_decay
        with torch.no_grad():
            for average, p in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                average.mul_(decay).add_(p, alpha=1 - decay)

    def step(self, i: int) -> None:
        moments, y = self.data.batch
        x0 = self.data.to_latent(moments, torch.randn_like(moments[:, ::2]))
        denoise, align = self.forward(x0, y)
        self.backward(denoise + align)
        self.update()
        self.loss_sum += denoise.item() + align.item()
