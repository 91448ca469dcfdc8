"""Small MMDiTs of random weights, and what is known of their captions."""

import torch

from sra_fast.data.facts import DataFacts
from sra_fast.models import MMDiT, TextFeatures

SIZES = dict(
    input_size=8,
    patch_size=2,
    in_channels=4,
    hidden_size=16,
    depth=2,
    num_heads=2,
    context_size=12,
    pooled_size=6,
)
TEXT = {
    "name": "clip",
    "fingerprint": "f" * 64,
    "tokens": 3,
    "width": 12,
    "pooled": 6,
    "masked": False,
    "encoders": [{"class": "CLIPTextModel", "sha256": "a" * 64, "tokens": 3}],
    "paths": ["/home/me/clip"],
}
FACTS = DataFacts("latents", (4, 8, 8), 1, scale=1.5, shift=0.06, text=TEXT)
# the places of an SD3 whose table is three times as large as the images it was first trained on
START, STEP = 4 / 3, 1 / 3
SD3_PLACES = dict(position_start=START, position_step=STEP, time_scale=1000.0)


def text_network(seed=0, **sizes) -> MMDiT:
    model = MMDiT(**{**SIZES, **sizes}).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def text_batch(model, count=3):
    torch.manual_seed(1)
    x = torch.randn(count, model.in_channels, model.input_size, model.input_size)
    pooled = torch.randn(count, model.pooled_size) if model.pooled_size else None
    text = TextFeatures(torch.randn(count, 3, model.context_size), pooled)
    return x, torch.tensor([0.03, 0.5, 1.0])[:count], text
