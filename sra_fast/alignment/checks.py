"""What is asked of an alignment target, whoever has written it: one line that names the target.

A run with a target that does not keep to it would end without an error, and its target would be
without effect, or another one after the run is resumed.
"""

from collections.abc import Container, Iterable

from torch import Tensor

from sra_fast.alignment.heads import Head
from sra_fast.alignment.target import Target, own_head
from sra_fast.alignment.teacher_target import TeacherTarget
from sra_fast.config.schema import AlignConfig, ModelConfig
from sra_fast.models import Backbone, DiffusionTransformer
from sra_fast.utils.checks import require_that
from sra_fast.utils.registry import TARGETS

# columns of the log that are no parts of the loss
COLUMNS = (
    *("step", "epoch", "lr", "loss", "grad_norm", "skipped", "align_weight", "align2_weight"),
    *("images_per_s", "ms_per_step", "timed_steps", "mfu", "peak_memory_gib"),
)
# names that a message has at most
SHOWN = 3


def check_kind(section: str, align: AlignConfig, model: ModelConfig) -> None:
    """ValueError for a class of targets that says of itself what cannot be.

    Args:
        section: of the configuration, ``align`` or ``align2``.
        align: its options, filled in.
        model: the student's, filled in.
    """
    kind = TARGETS[align.target]
    name = f"{section}.target {align.target}"
    layers = model.arguments()["depth"]
    depth = kind.network_depth(align)
    if depth is not None or issubclass(kind, TeacherTarget):
        require_that(
            depth is not None and 1 <= depth <= layers,
            f"{name}: network_depth must lie in [1, {layers}], the blocks of the model, "
            f"got {depth}",
        )
    head = kind.head_name(align)
    require_that(
        not kind.has_own_head() or head in (None, own_head(align.target)),
        f"{name}: make_head makes the head {own_head(align.target)}, got head_name {head}: "
        "leave head_name out",
    )


def check_head(section: str, align: AlignConfig, head: object) -> None:
    """ValueError unless ``head``, which ``make_head`` has returned, is one."""
    require_that(
        isinstance(head, Head),
        f"{section}.target {align.target}: make_head must return a Head "
        f"(sra_fast/alignment/heads.py), got {type(head).__name__}",
    )


def check_network(section: str, align: AlignConfig, network: Backbone | None) -> None:
    """ValueError unless ``network`` is as deep as the target asks for."""
    depth = TARGETS[align.target].network_depth(align)
    got = "none" if network is None else f"one of {network.depth}"
    require_that(
        depth is None or (network is not None and network.depth == depth),
        f"{section}.target {align.target} needs a network of {depth} blocks, got {got}",
    )


def check_target(section: str, target: Target, student: DiffusionTransformer) -> None:
    """ValueError for a target with parameters that nothing would train, or with state that would be
    lost, or that reads blocks which the student does not have.
    """
    name = f"{section}.target {target.align.target}"
    trainable = [key for key, value in target.named_parameters() if value.requires_grad]
    require_that(
        not trainable,
        f"{name} has trainable parameters {_listed(trainable)}: "
        "expected them in the module that make_head returns",
    )
    buffers = {key for key, _ in target.named_buffers(remove_duplicate=False)}
    # of these, the state dict has the persistent ones. The network's are the model's
    kept = [key for key in target.state_dict() if key in buffers and not key.startswith("network.")]
    require_that(
        not kept,
        f"{name} has persistent buffers {_listed(kept)}, which checkpoints do not keep: "
        "register_buffer(..., persistent=False) if they may be lost",
    )
    depths = sorted(target.depths)
    require_that(
        all(1 <= depth <= student.depth for depth in depths),
        f"{name}: depths must lie in [1, {student.depth}], the blocks of the model, got {depths}",
    )


def check_found(
    section: str, target: Target, found: object, taken: Container[str], trained: bool
) -> None:
    """ValueError unless ``found`` is what ``Target.loss`` is to return.

    No value is read: this waits for no device, and a CUDA graph or torch.compile may contain it.

    Args:
        section: ``align``, or ``align2`` of a second target.
        target: whose loss it is.
        found: what ``loss`` has returned.
        taken: names that other parts of the loss have in the log.
        trained: whether the loss is to have a gradient.
    """
    name = f"{section}.target {target.align.target}"
    if not isinstance(found, dict) or "align" not in found:
        raise ValueError(
            f'{name}: loss must return a dict with the loss as "align", got {_described(found)}'
        )
    suffix = section.removeprefix("align")
    for key, value in found.items():
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise ValueError(
                f'{name}: loss must return tensors [], got {_described(value)} as "{key}"'
            )
        if f"{key}{suffix}" in taken or f"{key}{suffix}" in COLUMNS:
            raise ValueError(
                f'{name}: loss must return names that are free, the log has "{key}{suffix}" already'
            )
    loss = found["align"]
    if not loss.is_floating_point() or (trained and not loss.requires_grad):
        raise ValueError(
            f'{name}: loss must return a float tensor with a gradient as "align", or lambda has no '
            f"effect, got {loss.dtype} {'with' if loss.requires_grad else 'without'} a gradient"
        )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {[*value.shape]}"
    if isinstance(value, dict):
        return f"a dict with {_listed(map(str, value)) or 'nothing'}"
    return f"a {type(value).__name__}"
