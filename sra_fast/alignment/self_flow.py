"""Self-Flow's target (arXiv 2603.06507): the student sees two noise levels in one image, the EMA
teacher the whole image at the cleaner of the two.
"""

from dataclasses import dataclass

import torch

from sra_fast.alignment.ema_teacher import EMATeacher, TeacherConfig
from sra_fast.alignment.target import share_of_depth
from sra_fast.config.schema import Config, Distance, ModelConfig, choice
from sra_fast.diffusion.draws import Draws
from sra_fast.diffusion.micro_batch import Times
from sra_fast.diffusion.process import Process
from sra_fast.models import TokenGroups
from sra_fast.utils.checks import require_that
from sra_fast.utils.registry import TARGETS


@dataclass
class SelfFlowConfig(TeacherConfig):
    """Two times per image for the student, the cleaner one for the EMA teacher (Self-Flow)."""

    target: str = choice(TARGETS, "self_flow")
    """where the target features come from"""
    distance: Distance = "cosine_patch"
    """distance between the features"""
    weight: float = 0.8
    """lambda: weight of the alignment loss"""
    second_share: float = 0.25
    """probability that a token has the second of its image's two times"""


@TARGETS.register("self_flow")
class SelfFlow(EMATeacher):
    """Dual-timestep scheduling: two independent times per image, the second for a random part of
    the tokens. There is one conditioning for each of the two.
    """

    config = SelfFlowConfig
    has_groups = True
    align: SelfFlowConfig

    @classmethod
    def layers(cls, model: ModelConfig) -> tuple[int, int]:
        return share_of_depth(model, 0.3), share_of_depth(model, 0.7)

    @classmethod
    def check(cls, align: SelfFlowConfig, cfg: Config) -> None:
        super().check(align, cfg)
        require_that(
            0 < align.second_share < 1,
            f"align.second_share must lie in (0, 1), got {align.second_share}",
        )

    def times(self, process: Process, draws: Draws) -> Times:
        uniform = torch.stack([draws.uniform, draws.second[:, 0]], dim=1)
        student, _ = process.times(uniform, torch.zeros_like(uniform))
        # group 1 has the second time; each token for itself, so that their number varies
        index = (draws.tokens < self.align.second_share).int()
        return Times(student, student.amin(1), TokenGroups(index))
