"""Small networks of random weights, and the ways in which other projects save them."""

import json
from dataclasses import asdict

import torch
from tiny_config import config

from sra_fast.checkpoint import reading
from sra_fast.checkpoint.manifest import (
    Manifest,
    Progress,
    file_name,
    read_manifest,
    write_manifest,
)
from sra_fast.checkpoint.shards import piece_key, write_pieces
from sra_fast.checkpoint.steps import named_by_latest, write_latest
from sra_fast.config.cli import save_config
from sra_fast.models import SiT
from sra_fast.utils.files import plain

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


def run_folder(folder, model, step: int = 7, facts: dict | None = None, student=None):
    """A run folder with a checkpoint of this model's EMA, in two ranks' files.

    ``student``: another model for the fp32 weights. The moments are 1 and 2 times the EMA.
    """
    cfg = config()
    folder.mkdir(parents=True, exist_ok=True)
    save_config(cfg, folder / reading.CONFIG)
    if facts is not None:
        (folder / reading.FACTS).write_text(json.dumps(facts))
    ema = flat(model)
    kinds = {
        "master": ema if student is None else flat(student),
        "exp_avg": ema,
        "exp_avg_sq": {name: 2 * value for name, value in ema.items()},
        "ema.main": ema,
    }
    write_checkpoint(folder, kinds, step, plain(asdict(cfg)), facts)
    return folder


def flat(model) -> dict:
    """Parameter -> its elements, 1-d."""
    return {name: p.detach().flatten().clone() for name, p in model.named_parameters()}


def write_checkpoint(run, kinds, step: int, settings: dict, facts: dict | None = None):
    """A whole checkpoint of ``{kind: {parameter: flat tensor}}`` in two ranks' files; its folder."""
    path = run / f"checkpoints/step_{step:08d}"
    named = named_by_latest(path.parent)
    before = None if named is None else read_manifest(named)
    path.mkdir(parents=True)
    files = {}
    for rank in (0, 1):
        pieces = {}
        for kind, parameters in kinds.items():
            for name, values in parameters.items():
                half = len(values) // 2
                start, part = (0, values[:half]) if rank == 0 else (half, values[half:])
                pieces[piece_key(kind, name, start)] = part.contiguous()
        files[file_name(rank)] = write_pieces(path / file_name(rank), pieces)
    manifest = Manifest(
        progress=Progress(step),
        epoch=0,
        counts=[float(step), 0.0, 0.0],
        world=2,
        stage=1,
        run_id="0",
        parent=None if before is None else before.step,
        parent_digest=None if before is None else before.digest,
        created="2026-01-01T00:00:00+00:00",
        files=files,
        settings=settings,
        emas={"main": {"decay": 0.9}},
        data=facts,
    )
    write_manifest(path, manifest)
    write_latest(path.parent, path.name)
    return path
