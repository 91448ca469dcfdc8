"""Models of codebases that the user has cloned: DiT, SiT, REPA, SRA, LightningDiT.

Nothing of them is copied here and nothing is changed: the module that holds the model is imported
from the checkout.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from benchmarks.other_models.diffusers_models import randomize
from benchmarks.timing import make_randn


@dataclass(frozen=True)
class Checkout:
    """Where a codebase has its model.

    Attributes:
        name: of the codebase.
        root: folder of the checkout that its programs run in, relative to it.
        module: that holds the model, relative to ``root``.
        beside: a file or folder by which codebases with the same file are told apart.
        family: name of the class; ``FAMILY_models`` holds its sizes.
        options: arguments of every size.
        tiny: of the tiny one.
        call: further arguments of ``forward``.
        stride: pixels per side of a latent.
    """

    name: str
    root: str
    module: str
    beside: str
    family: str
    options: dict = field(default_factory=dict)
    tiny: dict = field(default_factory=dict)
    call: dict = field(default_factory=dict)
    stride: int = 8

    @property
    def file(self) -> str:
        """Path of the module in the checkout."""
        return str(Path(self.root) / f"{self.module.replace('.', '/')}.py")


_ATTENTION = {"fused_attn": True, "qk_norm": False, "use_cfg": True}
_DECODER = {"decoder_hidden_size": 64}
CHECKOUTS = (
    Checkout("SRA", "SiT-SRA", "models.sit", "loss.py", "SiT", _ATTENTION, _DECODER, {"ad": 1}),
    Checkout(
        "LightningDiT",
        ".",
        "models.lightningdit",
        "models",
        "LightningDiT",
        {"use_qknorm": False, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True},
        # its autoencoder halves four times
        stride=16,
    ),
    Checkout(
        "REPA",
        ".",
        "models.sit",
        "loss.py",
        "SiT",
        _ATTENTION,
        {**_DECODER, "encoder_depth": 1, "projector_dim": 64, "z_dims": [32]},
    ),
    Checkout("SiT", ".", "models", "transport", "SiT"),
    Checkout("DiT", ".", "models", "diffusion", "DiT"),
)
# arguments of the tiny models
TINY = {"depth": 3, "hidden_size": 64, "num_heads": 2, "num_classes": 10, "in_channels": 4}


def recognise(path: Path) -> Checkout:
    """The codebase of a checkout, by its files.

    Raises:
        ValueError: none of those that are known.
    """
    for checkout in CHECKOUTS:
        if (path / checkout.file).is_file() and (path / checkout.root / checkout.beside).exists():
            return checkout
    known = ", ".join(f"{checkout.name} ({checkout.file})" for checkout in CHECKOUTS)
    raise ValueError(f"--checkout: expected a checkout of {known}; got {path}")


@contextlib.contextmanager
def no_decorators() -> Iterator[None]:
    """Meanwhile the decorator ``torch.compile`` changes nothing.

    LightningDiT has it on parts of its model. They would be compiled in the eager program, too; and
    torch 2.13 cannot compile a model around one of them, whatever the backend.
    """
    compiler = torch.compile
    torch.compile = lambda model=None, **options: model or (lambda model: model)
    try:
        yield
    finally:
        torch.compile = compiler


def import_module(path: Path, checkout: Checkout) -> ModuleType:
    """The module with the model, imported as the codebase's own programs import it.

    Raises:
        ValueError: it needs a package that is missing, or fails otherwise.
    """
    root = str((path / checkout.root).resolve())
    # two checkouts may have modules of the same name
    top = checkout.module.partition(".")[0]
    for name in [name for name in sys.modules if name.partition(".")[0] == top]:
        del sys.modules[name]
    importlib.invalidate_caches()
    sys.path.insert(0, root)
    try:
        with no_decorators():
            return importlib.import_module(checkout.module)
    except ModuleNotFoundError as error:
        missing = (error.name or str(error)).partition(".")[0]
        raise ValueError(
            f"--checkout: {checkout.file} of {checkout.name} needs the package {missing}"
        ) from error
    # whatever other people's code raises
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(
            f"--checkout: {checkout.file} of {checkout.name} cannot be imported: {reason}"
        ) from error
    finally:
        sys.path.remove(root)


def keep_blocks(network: nn.Module, layers: int) -> None:
    """Keep the first blocks of a network.

    Raises:
        ValueError: it has not so many, or needs more.
    """
    most = len(network.blocks)
    # REPA's projection comes after this block
    least = getattr(network, "encoder_depth", 1)
    if not least <= layers <= most:
        raise ValueError(f"--layers: expected {least} to {most} of this model, got {layers}")
    network.blocks = network.blocks[:layers]


def build(
    path: Path,
    model: str | None,
    side: int,
    batch: int,
    device: str,
    layers: int | None = None,
) -> tuple[str, nn.Module, dict]:
    """A model with random weights in fp32, none of which is zero, and its inputs.

    These codebases train in half precision by autocast; with such weights they do not run.

    Args:
        path: of the checkout.
        model: a size that the codebase has, such as "SiT-B/2"; None for a tiny one.
        side: of the square latents.
        batch: samples.
        device: "cpu" or "cuda".
        layers: how many blocks, from the first; None or 0 for all.

    Returns:
        A name, the model in ``train`` mode without dropped labels, and the arguments of its
        ``forward``.

    Raises:
        ValueError: an unknown checkout or model, one that cannot be imported, or one that cannot
            have so many blocks or so few.
    """
    checkout = recognise(path)
    module = import_module(path, checkout)
    options = {"input_size": side, "class_dropout_prob": 0.0, **checkout.options}
    with torch.device(device):
        if model is None:
            name = f"tiny {checkout.family}"
            network = getattr(module, checkout.family)(**options, **TINY, **checkout.tiny)
        else:
            name = model
            sizes = getattr(module, f"{checkout.family}_models")
            if model not in sizes:
                raise ValueError(f"--model: expected one of {', '.join(sizes)}; got {model!r}")
            network = sizes[model](**options)
    if layers:
        name += f", {layers} layers"
        keep_blocks(network, layers)
    randomize(network)
    network = network.to(device=device).train()
    randn = make_randn(0, device)
    inputs = {
        "x": randn(batch, network.in_channels, side, side),
        "t": torch.linspace(0.2, 0.7, batch, device=device),
        "y": torch.arange(batch, device=device) % 10,
        **checkout.call,
    }
    return f"{checkout.name} {name}", network, inputs
