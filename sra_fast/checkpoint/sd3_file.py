"""Weights under SD3's names, of SD3 itself or of another MMDiT, as exports.

The names are those of this engine. What else differs:

- SD3's times run to 1000 in the sinusoid (``time_scale``), and it is sampled at shifted times
  (``diffusion.time_shift``). Its file says neither.
- Its position table is that of the largest image. A model has the middle of it, as places that are
  computed (``position_start``, ``position_step``).
- Neither SD3 nor REPA has SRA's projection head. It is initialised anew.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sra_fast import models
from sra_fast.checkpoint.export import described, write_export
from sra_fast.checkpoint.load_model import diffusion_in, fill
from sra_fast.checkpoint.schedulers import SD3_SHIFT
from sra_fast.config.schema import DiffusionConfig
from sra_fast.data.facts import DataFacts
from sra_fast.models import MMDiT
from sra_fast.utils.checks import require_that

# what SD3 multiplies its times by
TIME_SCALE = 1000.0


def import_state(
    state: dict[str, Tensor],
    args: argparse.Namespace | None,
    source: str,
    name: str | None,
    out: str,
    num_heads: int | None = None,
    seed: int = 0,
    input_size: int | None = None,
    time_scale: float | None = None,
) -> None:
    """Write the weights of an MMDiT as an export.

    Args:
        state: under the published names, checked.
        args: of a training checkpoint; None: it has none.
        source: where the weights were read from, for messages.
        name: of the model whose sizes are expected, ``MMDiT-REPA/2`` for example; None: any.
        out: the ``.safetensors`` file.
        num_heads: for weights that do not show it.
        seed: of the projection head, if the weights have none.
        input_size: side of the latents; it must be given for SD3, whose table is larger.
        time_scale: what times are multiplied by; default: what ``args`` say, or 1000 for weights
            with a pooled feature (SD3), or 1.

    Raises:
        ValueError: the weights are those of another network.
    """
    is_pooled = "y_embedder.mlp.0.weight" in state
    told = getattr(args, "time_scale", None)
    require_that(
        input_size is not None or told is not None or not is_pooled,
        f"{source} looks like SD3, whose position table is that of its largest image: expected "
        "--input_size, the side of the latents (128 for images of 1024)",
    )
    require_that(
        not is_pooled or "pos_embed" in state,
        f"{source} looks like SD3 and has no position table pos_embed: the places of its patches "
        "are not known",
    )
    wanted = _preset(name)
    heads = num_heads or getattr(args, "num_heads", None) or wanted.get("num_heads")
    _, arguments = models.arguments_from_state_dict(state, heads, input_size=input_size)
    for key, value in wanted.items():
        require_that(
            arguments[key] == value,
            f"the weights are no {name}: {key} should be {value}, it is {arguments[key]}",
        )
    if time_scale is None:
        time_scale = told if told is not None else TIME_SCALE if is_pooled else 1.0
    diffusion = diffusion_in(None, args, source)
    # another MMDiT under these names has times of its own
    if args is None and is_pooled and time_scale == TIME_SCALE:
        diffusion = replace(diffusion, time_shift=SD3_SHIFT)
    export_state(state, {**arguments, "time_scale": time_scale}, out, seed, diffusion)


def _preset(name: str | None) -> dict:
    """The sizes that a model's name stands for; none without a name."""
    if name is None:
        return {}
    family, sizes = models.preset(name)
    require_that(
        family is MMDiT, f"the weights are of an MMDiT, of captions: expected no --model {name}"
    )
    return sizes


def export_state(
    state: dict[str, Tensor],
    arguments: dict,
    out: str,
    seed: int,
    diffusion: DiffusionConfig,
    facts: DataFacts | None = None,
) -> None:
    """Write an export of the MMDiT of these arguments with these weights. A projection head that
    they lack is that of ``seed``.
    """
    torch.manual_seed(seed)
    model = MMDiT(**arguments).eval()
    fill(model, state)
    architecture = {"family": model.family, "arguments": models.arguments_of(model)}
    config = {"architecture": architecture, "diffusion": described(diffusion)}
    write_export(Path(out), model.state_dict(), config, None, facts)
