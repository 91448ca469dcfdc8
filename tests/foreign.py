"""Small networks of random weights, and the ways in which other projects save them."""

import json

import torch
from tiny_config import config

from sra_fast.checkpoint import reading
from sra_fast.config.cli import save_config
from sra_fast.models import SiT

SIZES = dict(
    input_size=8,
    patch_size=2,
    in_channels=1,
    hidden_size=32,
    depth=4,
    num_heads=2,
    num_classes=10,
)


def network(family=SiT, seed=0, **sizes) -> SiT:
    """Every parameter matters: the zeros of adaLN-Zero are replaced too."""
    model = family(**{**SIZES, **sizes}).eval()
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def weights(model, without=()) -> dict:
    """A copy of the state dict, without the names that begin with one of ``without``."""
    return {
        name: value.clone()
        for name, value in model.state_dict().items()
        if not name.startswith(tuple(without))
    }


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + name: value for name, value in state.items()}


def same(a: dict, b: dict) -> bool:
    """Whether two state dicts have the same names and bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run_folder(folder, model, step: int = 7, facts: dict | None = None):
    """A run folder with a checkpoint of this model's EMA, in two ranks' files."""
    cfg = config()
    checkpoint = folder / f"checkpoints/step_{step:08d}"
    checkpoint.mkdir(parents=True)
    save_config(cfg, folder / reading.CONFIG)
    state = {"step": step, "world_size": 2}
    (checkpoint / reading.STATE).write_text(json.dumps(state))
    for rank in (0, 1):
        pieces = {}
        for name, p in model.named_parameters():
            half = p.numel() // 2
            flat = p.detach().flatten()
            start, values = (0, flat[:half]) if rank == 0 else (half, flat[half:])
            pieces[name] = (start, values.clone())
        torch.save(pieces, checkpoint / f"ema_rank_{rank:05d}.pt")
    (checkpoint.parent / "latest").write_text(checkpoint.name)
    if facts is not None:
        (folder / reading.FACTS).write_text(json.dumps(facts))
    return folder
