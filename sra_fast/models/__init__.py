"""SiT, DiT and MMDiT with SRA's projection head, and the sizes of the papers."""

from sra_fast.models.backbone import ALIGN_HEADS, Backbone, DiffusionTransformer, Features
from sra_fast.models.conditioning import ClassLabels, Conditioning, TextFeatures
from sra_fast.models.mmdit import MMDiT, TextBackbone
from sra_fast.models.registry import (
    SIZES,
    arguments_from_state_dict,
    arguments_of,
    create_model,
    has_joint_blocks,
    preset,
)
from sra_fast.models.token_groups import TokenGroups
from sra_fast.models.transformer import ClassBackbone, DiT, SiT

__all__ = [
    "ALIGN_HEADS",
    "SIZES",
    "Backbone",
    "ClassBackbone",
    "ClassLabels",
    "Conditioning",
    "DiT",
    "DiffusionTransformer",
    "Features",
    "MMDiT",
    "SiT",
    "TextBackbone",
    "TextFeatures",
    "TokenGroups",
    "arguments_from_state_dict",
    "arguments_of",
    "create_model",
    "has_joint_blocks",
    "preset",
]
