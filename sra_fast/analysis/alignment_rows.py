"""How long features are at every layer and time, and how far a student's are from its teacher's."""

from collections.abc import Iterable
from dataclasses import fields

import torch
from torch import Tensor

from sra_fast import ops
from sra_fast.alignment.ema_teacher import EMATeacherConfig, TeacherConfig
from sra_fast.alignment.target import default_layers
from sra_fast.analysis.features import Images, noisy_features
from sra_fast.checkpoint.load_model import LoadedModel
from sra_fast.config.schema import DiffusionConfig, ModelConfig
from sra_fast.diffusion.draws import block_seed
from sra_fast.diffusion.process import Noised
from sra_fast.models import Conditioning, DiffusionTransformer
from sra_fast.utils.registry import PROCESSES, TARGETS


def mean_of(values: Iterable[float]) -> float:
    """The mean of at least one value."""
    listed = list(values)
    return sum(listed) / len(listed)


def norm_rows(
    model: DiffusionTransformer, path: str, images: Images, times: list[float], batch: int
) -> list[dict]:
    """Mean length of the tokens after every block, with the images' own labels or captions.

    Args:
        model, path, images, batch: see ``noisy_features``.
        times: in [0, 1]; 0 is data.

    Returns:
        Rows ``{"time", "layer", "norm"}`` in the order of times and layers.
    """
    layers = list(range(1, model.depth + 1))
    length = lambda tokens: tokens.float().norm(dim=-1).mean(1)
    rows = []
    for time in times:
        told = images.condition
        _, found = noisy_features(model, path, images, told, time, layers, length, batch)
        rows += [
            {"time": time, "layer": layer, "norm": float(norms.double().mean())}
            for layer, norms in zip(layers, found, strict=True)
        ]
    return rows


def distance_rows(
    student: LoadedModel,
    teacher: LoadedModel,
    images: Images,
    times: list[float],
    batch: int,
    seed: int = 0,
) -> tuple[dict, list[dict]]:
    """How far the student's features are from its EMA teacher's, with the images' own labels or
    captions.

    In a run whose target has an EMA teacher, this is what its loss measures: the student's features
    after the aligned layer and the head, if there is one, against the teacher's after its layer, at
    a time that is earlier by U(0, t_max), in the target's own distance. Each image has one time,
    also where the target trains with two.

    In every other run, also a plain one, the layers, the distance and t_max are those that
    ``ema_teacher`` has by default, and no head is used: nothing has trained one. Such distances
    compare with each other, and not with those after a head.

    Args:
        student, teacher: of one run, on one device; the teacher has the EMA's weights.
        images: held-out ones.
        times: of the student, in [0, 1]; 0 is data.
        batch: images per model call.
        seed: of the gaps between the two times.

    Returns:
        What was compared (``target``, layers, ``head``, ``distance``, ``t_max``), and rows
        ``{"time", "distance", "cosine"}``; ``cosine`` is 1 minus the cosine of a token's two
        vectors, which does not depend on their lengths.
    """
    align, target = _teacher_options(student.config or {}, student.model)
    gap = align.largest_gap
    process = PROCESSES[student.model.process].from_config(
        DiffusionConfig(path=student.path), t_max=gap
    )
    generator = torch.Generator().manual_seed(block_seed(int(seed), -7))
    gaps = torch.rand(len(images.x0), generator=generator)
    rows = []
    for time in times:
        found = []
        for start in range(0, len(gaps), batch):
            part = slice(start, start + batch)
            uniform = torch.full((len(gaps[part]),), time)
            noised = process.corrupt(
                images.x0[part], images.noise[part], *process.times(uniform, gaps[part])
            )
            told = images.condition.select(part)
            compared = _compared(student.model, teacher.model, noised, told, align)
            found.append(torch.stack(compared, 1).double().cpu())
        distance, cosine = torch.cat(found).mean(0).tolist()
        rows.append({"time": time, "distance": distance, "cosine": cosine})
    what = {
        "target": target,
        "student_layer": align.student_layer,
        "teacher_layer": align.teacher_layer,
        "head": align.head,
        "distance": align.distance,
        "t_max": gap,
    }
    return what, rows


def _teacher_options(config: dict, model: DiffusionTransformer) -> tuple[TeacherConfig, str]:
    """The options of the run's target with an EMA teacher, or the default ones without a head; and
    the target's name.
    """
    names = []
    for section in ("align", "align2"):
        held = config.get(section, {"target": "none"})
        names.append(held["target"])
        kind = TARGETS[held["target"]].config
        if issubclass(kind, TeacherConfig):
            known = {item.name for item in fields(kind)}
            chosen = {name: value for name, value in held.items() if name in known}
            return kind(**chosen), held["target"]
    sizes = ModelConfig(**config["model"]) if "model" in config else None
    if sizes is None:
        sizes = ModelConfig(name=f"{model.family}-B/2", depth=model.depth)
    student_layer, teacher_layer = default_layers(sizes)
    align = EMATeacherConfig(
        head="none", student_layer=student_layer, teacher_layer=max(student_layer, teacher_layer)
    )
    return align, names[0]


@torch.no_grad()
def _compared(
    student: DiffusionTransformer,
    teacher: DiffusionTransformer,
    noised: Noised,
    condition: Conditioning,
    align: TeacherConfig,
) -> list[Tensor]:
    """Two distances of every image, each ``[B]`` fp32."""
    device = student.pos_embed.device
    condition = condition.to(device)
    predicted = student.features(
        noised.x.to(device), noised.t.to(device), condition, align.student_layer
    )
    if align.head == "mlp":
        predicted = student.ap_head(predicted)
    target = teacher.features(
        noised.x_teacher.to(device), noised.t_teacher.to(device), condition, align.teacher_layer
    )
    return [
        ops.align_distance(predicted, target, kind, beta=align.beta, reduction="none")
        for kind in (align.distance, "cosine_patch")
    ]
