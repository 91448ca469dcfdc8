"""SiT and DiT with SRA's projection head, and the sizes of the papers."""

from sra_fast.models.conditioning import ClassLabels, Conditioning
from sra_fast.models.registry import (
    SIZES,
    arguments_from_state_dict,
    arguments_of,
    create_model,
    preset,
)
from sra_fast.models.token_groups import TokenGroups
from sra_fast.models.transformer import ALIGN_HEADS, Backbone, DiT, Features, SiT

__all__ = [
    "ALIGN_HEADS",
    "SIZES",
    "Backbone",
    "ClassLabels",
    "Conditioning",
    "DiT",
    "Features",
    "SiT",
    "TokenGroups",
    "arguments_from_state_dict",
    "arguments_of",
    "create_model",
    "preset",
]
