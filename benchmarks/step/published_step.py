"""A training step of the published code, from a checkout that the user names.

Nothing of it is copied here: its model and its loss are imported and run in the loop that it uses on one
GPU. That loop has fp16 autocast around the student's forward pass only, with a gradient scaler. The teacher is
the fp32 EMA outside autocast, with products in TF32. The optimizer is clipping, torch's default AdamW, and a pair of
kernels per tensor for the EMA. The host reads both losses after every step. In fp32 there is neither
autocast nor a scaler.
"""

import copy
import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from sra_fast.config.schema import Config

FILES = {"model": "SiT-SRA/models/sit.py", "loss": "SiT-SRA/loss.py"}
# names of distances: ours to the published code's
DISTANCES = {"smooth_l1": "sml1", "l1": "l1", "l2": "l2", "cosine_token": "cos"}


def import_published(checkout: str | None) -> dict[str, ModuleType]:
    """The modules of ``FILES``.

    Raises:
        ValueError: the checkout does not hold them, or they need a package that is missing.
    """
    if checkout is None:
        raise ValueError(
            "the published code's step needs --published PATH: a checkout of the published code"
        )
    found = {}
    for name, file in FILES.items():
        path = Path(checkout) / file
        if not path.is_file():
            raise ValueError(
                f"--published: expected a checkout that holds {file}, found none at {path}"
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


class PublishedStep:
    """Model, EMA, loss and one training step of the published code.

    Args:
        cfg: size, layers, distance, weight and optimizer are read. Widths and depths are the published code's.
        checkout: folder of the published code.
        data: a data set that gives the same batch forever.
        device: to run on.

    Raises:
        ValueError: not a checkout, or a configuration that the published code does not know.
    """

    def __init__(self, cfg: Config, checkout: str | None, data, device: torch.device):
        self.cfg = cfg
        self.data = data
        self.device = device
        self.half = cfg.train.precision != "fp32"
        self.dtype = "float16" if self.half else "float32"
        published = import_published(checkout)
        models = published["model"].SiT_models
        if cfg.model.name not in models or cfg.align.distance not in DISTANCES:
            raise ValueError(
                f"the published code has no {cfg.model.name} with distance {cfg.align.distance}"
            )
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.manual_seed(cfg.train.seed)

        sizes = {
            "input_size": cfg.model.input_size,
            "num_classes": cfg.model.num_classes,
            "use_cfg": True,
            "fused_attn": True,
            "qk_norm": cfg.model.qk_norm,
        }
        # the published S models keep the prediction layer at B's width and cannot run
        if cfg.model.name.startswith("SiT-S"):
            sizes["decoder_hidden_size"] = cfg.model.arguments()["hidden_size"]
        self.model = models[cfg.model.name](**sizes).to(device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.model.train()
        self.criterion = published["loss"].SRALoss(
            block_out_s=cfg.align.student_layer,
            block_out_t=cfg.align.teacher_layer,
            t_max=cfg.align.t_max,
            loss_type=DISTANCES[cfg.align.distance],
        )
        # torch's default implementation, foreach
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=cfg.optim.lr,
            betas=tuple(cfg.optim.betas),
            eps=cfg.optim.eps,
            weight_decay=cfg.optim.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.half)
        self.loss_sum = torch.zeros(())

    @property
    def phases(self) -> list[tuple[object, str, str]]:
        """(owner, attribute, phase) of the functions whose time is that of a phase."""
        return [
            (self, "forward", "forward"),
            (self.ema, "forward", "teacher"),
            (self, "backward", "backward"),
            (self, "update", "optimizer"),
        ]

    def student(self, *args, **kw) -> tuple:
        """The model under autocast, with fp32 outputs, as accelerate wraps it."""
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            out = self.model(*args, **kw)
        return tuple(x.float() if x.is_floating_point() else x for x in out)

    def forward(self, x0: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Denoising loss and weighted alignment loss."""
        denoise, align = self.criterion(self.student, x0, self.ema, y)
        return denoise.mean(), align.mean() * self.cfg.align.weight

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def update(self) -> None:
        """Clip, AdamW and EMA."""
        # gradients must have their true scale when they are clipped
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
        # .item() waits for the device, as the published loop does
        self.loss_sum += denoise.item() + align.item()
