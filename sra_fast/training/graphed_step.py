"""Forward and backward pass of a step as one CUDA graph: whether it is possible, and its inputs."""

import logging
from collections.abc import Sequence

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from sra_fast.alignment.objective import SRAObjective
from sra_fast.diffusion.micro_batch import MicroBatch
from sra_fast.models import DiffusionTransformer
from sra_fast.training.checks import check_graph
from sra_fast.training.plan import Plan
from sra_fast.utils.checks import require_that
from sra_fast.utils.cuda_graph import GraphedGradients, held_accumulators
from sra_fast.zero.fused_step import PartitionedStep, release_accumulators

log = logging.getLogger("sra_fast")


def make_graphed(plan: Plan, engine, student: DiffusionTransformer) -> GraphedGradients | None:
    """What replays forward and backward pass as a graph, or None where DeepSpeed runs them.

    Raises:
        ValueError: a graph is asked for and DeepSpeed stands in its way. If it is only the default,
            that is logged.
    """
    cuda = next(student.parameters()).is_cuda
    asked = plan.cfg.train.graph
    # a CPU runs the same program without a graph, where that is asked for
    if asked is False or (asked is None and not (cuda and plan.world == 1)):
        return None
    try:
        # one that was asked for has passed this before
        check_graph(plan.cfg, plan.ds_config, plan.stage, plan.world)
        graphed = graphed_step(engine, student, plan.accumulation, graphs=cuda)
        _check_engine(engine, plan.stage, graphed)
    except ValueError as error:
        if asked:
            raise
        log.warning("no CUDA graph of the step, the host launches every kernel: %s", error)
        return None
    return graphed


def _check_engine(engine, stage: int, graphed: GraphedGradients) -> None:
    """ValueError for what only the engine shows to stand in a graph's way."""
    require_that(
        stage == 0 or getattr(engine.optimizer.step, "takes_gradients", False),
        "train.graph needs gradients as the backward pass leaves them; DeepSpeed's JSON lets it "
        "convert or scale them",
    )
    # a capture does the same first: count what would still be held then
    graphed.release()
    held = held_accumulators(graphed.parameters)
    require_that(
        not held,
        f"train.graph: this version of DeepSpeed holds autograd's nodes of {held} parameters",
    )


def graphed_step(
    engine: deepspeed.DeepSpeedEngine,
    student: DiffusionTransformer,
    accumulation: int,
    graphs: bool = True,
) -> GraphedGradients:
    """The objective's loss and its gradients.

    They are this process's share of the mean over ``accumulation`` micro-batches and, if the
    engine's step adds up the gradients of all processes, over these. Without ``graphs`` the same
    runs eagerly.
    """
    parameters = list(student.parameters())
    step = engine.optimizer.step
    places = step.places_of(parameters) if isinstance(step, PartitionedStep) else []
    addends = accumulation * (dist.get_world_size() if places else 1)
    return GraphedGradients(
        StepLoss(engine.module, addends),
        parameters,
        graphs,
        lambda: release_accumulators(parameters),
        places,
    )


class StepLoss:
    """The objective's loss as a function of tensors only, as a CUDA graph needs it.

    Args:
        objective: of the run.
        addends: micro-batches whose gradients are added up: the loss is divided by their number.
    """

    def __init__(self, objective: SRAObjective, addends: int):
        self.objective = objective
        self.addends = addends
        # all batches of a run are of one kind: the last one tells what the tensors are
        self.like: MicroBatch | None = None

    def inputs(
        self, batch: MicroBatch, weights: Sequence[float], phase: Sequence[bool]
    ) -> tuple[Tensor, ...]:
        """The tensors of a step.

        ``phase``: which targets are computed. Their lambdas are scalars, and the others' have no
        element: kinds of steps differ in shapes.
        """
        self.like = batch
        device = batch.x0.device
        lambdas = (
            torch.full((), weight, device=device) if on else torch.empty(0, device=device)
            for weight, on in zip(weights, phase, strict=True)
        )
        return (*lambdas, *batch.tensors())

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        count = len(self.objective.targets)
        weights = [weight if weight.dim() == 0 else 0.0 for weight in inputs[:count]]
        loss, parts = self.objective(self.like.with_tensors(inputs[count:]), weights)
        return loss / self.addends, {"loss": loss, **parts}
