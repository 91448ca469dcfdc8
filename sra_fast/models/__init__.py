"""SiT and DiT with SRA's projection head, and the sizes of the papers."""

from sra_fast.models.conditioning import ClassLabels, Conditioning
from sra_fast.models.registry import (
    SIZES,
    arguments_from_state_dict,
    arguments_of,
    create_model,
    preset,
)
from sra_fast.models.transformer import Backbone, DiT, SiT

__all__ = [
    "SIZES",
    "Backbone",
    "ClassLabels",
    "Conditioning",
    "DiT",
    "SiT",
    "arguments_from_state_dict",
    "arguments_of",
    "create_model",
    "preset",
]
