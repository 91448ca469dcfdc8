"""SRA's target: features of a cleaner input, from a deeper block of the student's own EMA.

Only the blocks up to the teacher layer n exist and run.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sra_fast.alignment.target import Inputs, check_layers, compare
from sra_fast.alignment.teacher_target import TeacherTarget
from sra_fast.config.schema import Config, DistanceConfig
from sra_fast.diffusion.micro_batch import MicroBatch
from sra_fast.models import Backbone, Conditioning, DiffusionTransformer, Features
from sra_fast.utils.checks import require_that
from sra_fast.utils.cuda_graph import Graphed
from sra_fast.utils.registry import TARGETS


@dataclass
class TeacherConfig(DistanceConfig):
    """Options of every target that has an EMA teacher."""

    teacher_layer: int | None = None
    """n: the teacher stops after this block (1-based, at least m); default: the paper's for B, L
    and XL, else its rule"""
    head: Literal["mlp", "none"] = "mlp"
    """what the student's features pass before they are compared: the projection head, or nothing"""
    teacher_labels: Literal["dropped", "kept"] = "dropped"
    """whether the teacher sees the student's labels with the dropped ones, or all labels"""
    teacher_dtype: Literal["auto", "fp32", "fp8"] = "auto"
    """precision of the teacher. auto: the training precision; fp32: as in the published code; fp8:
    bf16 with the three large products of a block in e4m3, their weights rounded in the optimizer's
    pass (Hopper or newer, ZeRO 0-2, train.precision bf16)"""
    teacher_graph: bool = False
    """replay the teacher's forward as a CUDA graph (ZeRO 0-2)"""
    teacher_stream: bool | None = None
    """run the teacher during the student's forward, in a second CUDA stream (ZeRO 0-2); default:
    where the step is one CUDA graph. Elsewhere a second stream costs the host more than it gains"""


@dataclass
class EMATeacherConfig(TeacherConfig):
    """Alignment to the EMA teacher (SRA)."""

    t_max: float = 0.2
    """the teacher's time is earlier by U(0, t_max)"""

    @property
    def largest_gap(self) -> float:
        return self.t_max


@TARGETS.register("ema_teacher")
class EMATeacher(TeacherTarget):
    """Features after block n of the EMA teacher.

    Without ``teacher_stream`` they are computed after the student's forward: the all-gather of the
    teacher's weights has that long to finish. With it they are computed during the student's
    forward.
    """

    config = EMATeacherConfig
    align: TeacherConfig

    def __init__(self, align: TeacherConfig, network: Backbone):
        super().__init__(align, network)
        if align.teacher_graph:
            # replayed as a CUDA graph
            self.run = Graphed(self.run)
        # None: the teacher runs in the student's stream
        self.stream = torch.cuda.Stream() if align.teacher_stream else None
        # what the second stream computes, from ``start`` to ``result``
        self.target: Tensor | None = None

    @classmethod
    def network_depth(cls, align: TeacherConfig) -> int:
        return align.teacher_layer

    @classmethod
    def has_head(cls, align: TeacherConfig) -> bool:
        return align.head == "mlp"

    @classmethod
    def fill_in(cls, align: TeacherConfig, cfg: Config) -> None:
        super().fill_in(align, cfg)
        if align.teacher_layer is None:
            # a student layer that was given may lie deeper than the rule's teacher layer
            align.teacher_layer = max(cls.layers(cfg.model)[1], align.student_layer)

    @classmethod
    def check(cls, align: TeacherConfig, cfg: Config) -> None:
        check_layers(align, cfg)
        gap = align.largest_gap
        require_that(0 <= gap <= 1, f"align.t_max must lie in [0, 1], got {gap}")

    @classmethod
    def check_device(cls, align: TeacherConfig, cfg: Config, stage: int, cuda: bool) -> None:
        # both need weights that keep their address: ZeRO 3 gathers them anew for every forward
        for name in ("teacher_graph", "teacher_stream"):
            if getattr(align, name):
                require_that(stage < 3, f"align.{name} needs a ZeRO stage below 3, got {stage}")
                require_that(cuda, f"align.{name} needs a CUDA device")
        # ZeRO 3 partitions all parameters in one dtype, the training precision
        if align.teacher_dtype == "fp32" and cfg.train.precision != "fp32":
            require_that(
                stage < 3,
                "align.teacher_dtype fp32 with train.precision bf16 needs a ZeRO stage below 3",
            )
        if align.teacher_dtype == "fp8":
            # stage 3 copies the EMA into ZeRO's bf16 partitions, which have no room for e4m3 and
            # its scales
            width = cfg.model.arguments()["hidden_size"]
            require_that(
                stage < 3 and cfg.train.precision == "bf16",
                "align.teacher_dtype fp8 needs train.precision bf16 and a ZeRO stage below 3",
            )
            require_that(
                width % 16 == 0,
                "align.teacher_dtype fp8 needs a model.hidden_size that is a multiple of 16, "
                f"got {width}",
            )
            require_that(
                not cuda or torch.cuda.get_device_capability() >= (9, 0),
                "align.teacher_dtype fp8 needs compute capability 9.0",
            )

    def will_be_captured(self) -> None:
        if self.align.teacher_stream is None:
            self.stream = torch.cuda.Stream()

    def told(self, batch: MicroBatch) -> Conditioning:
        if self.align.teacher_labels == "dropped":
            return batch.condition
        none = torch.zeros(len(batch), dtype=torch.bool, device=batch.x0.device)
        return batch.condition.dropped(none)

    def start(self, inputs: Inputs) -> None:
        super().start(inputs)
        if self.stream is not None:
            # the inputs are made in the current stream: the second one must not read them earlier
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.target = self._compute()

    def loss(
        self, student: DiffusionTransformer, features: Features, inputs: Inputs
    ) -> dict[str, Tensor]:
        predicted = self.projected(student, features, inputs)
        return compare(predicted, self.result(), self.align.distance, self.align.beta)

    def result(self) -> Tensor:
        if self.stream is None:
            return super().result()
        # the loss reads the features in the current stream
        torch.cuda.current_stream().wait_stream(self.stream)
        target = self.target
        self.target = None
        # they were allocated in the second stream: without this, the allocator could hand their
        # memory to that stream while the loss still reads them
        target.record_stream(torch.cuda.current_stream())
        # freed only now, when both streams have met
        self.inputs = ()
        return target
