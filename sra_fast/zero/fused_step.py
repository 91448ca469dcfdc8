"""A replacement for DeepSpeed's optimizer step: one pass over the memory.

The gradient norm comes first; then clipping, AdamW, the rounded weights, the EMA and the teacher's
copy of it are one pass. DeepSpeed's own step converts every gradient to fp32 (stages 1 and 2:
twice), scales it in a second pass, and rounds the weights in a third.

Bytes per parameter, EMA and teacher's copy included, counted on SiT-S/8 in bf16: 39.3 here at
stage 1 on one process, 43.3 on several, 41.9 at stage 3. DeepSpeed's step with torch's AdamW: 85.9.
"""

from collections.abc import Iterable

import deepspeed.comm as dist
import torch
from torch import Tensor

from sra_fast.ops.adamw_ema import Gradient
from sra_fast.zero.deepspeed_names import check_names
from sra_fast.zero.guard import UpdateGuard
from sra_fast.zero.master_weights import elements_between, gather_weights
from sra_fast.zero.optimizer import clip_factor


class FusedStep:
    """Replaces ``step`` of DeepSpeed's ZeRO optimizer. The gradient norm is not read on the host.

    Args:
        engine: of the subclass's ZeRO stage, with an ``AdamWEMA``.
        limit: of the global gradient norm, 0 for none.
        guard: decides whether the step is taken.

    Attributes:
        takes_gradients: DeepSpeed touches no gradient: this step takes those that the backward pass
            left in the parameters.

    Raises:
        RuntimeError: this version of DeepSpeed has other names.
    """

    takes_gradients = False

    def __init__(self, engine, limit: float, guard: UpdateGuard):
        check_names(engine.optimizer, engine.zero_optimization_stage())
        self.zero = engine.optimizer
        self.limit = limit
        self.guard = guard
        # an attribute of the instance hides the method of the class: engine.step() calls this
        # object
        self.zero.step = self

    def _decide(self, gradients: list[Tensor], group=None) -> None:
        """Compute the norm of the whole gradient, and from it whether the next step is taken and what
        it multiplies by.

        Each process of ``group`` holds a part of the gradient; None: all of it. Everything stays on
        the device in fp32, and NaN stays NaN.
        """
        # one launch computes the norms of all tensors
        squared = torch.stack(torch._foreach_norm(gradients, 2, torch.float32)).square().sum()
        if group is not None:
            dist.all_reduce(squared, group=group)
        norm = squared.sqrt()
        # the engine returns it as get_global_grad_norm()
        self.zero._global_grad_norm = norm
        self.guard.decide(norm)
        self.zero.optimizer.clip_scale = clip_factor(norm, self.limit)


def _is_alone(group) -> bool:
    """Whether there is no other process to send to."""
    return dist.get_world_size(group) == 1


def gradient_of(p: Tensor) -> Tensor:
    """The gradient that the backward pass left in a parameter; zeros if it left none."""
    return torch.zeros_like(p) if p.grad is None else p.grad


class ReplicatedStep(FusedStep):
    """Stage 0 in bf16: norm, then one pass per parameter."""

    def __init__(self, engine, limit: float, guard: UpdateGuard):
        super().__init__(engine, limit, guard)
        # one process has nothing to average
        if dist.get_world_size() == 1:
            engine.enable_backward_allreduce = False

    @torch.no_grad()
    def __call__(self, closure=None) -> None:
        zero = self.zero
        # engine.was_step_applied() reads it: the host does not know whether the guard takes the step
        zero.overflow = False
        groups = [[gradient_of(p) for p in group] for group in zero.fp16_groups]
        self._decide([gradient for group in groups for gradient in group])
        for settings, gradients, weights, masters in zip(
            zero.param_groups, groups, zero.fp16_groups, zero.fp32_groups, strict=True
        ):
            for gradient, p, master in zip(gradients, weights, masters, strict=True):
                zero.optimizer.update(master, gradient, settings, p.data)


class PartitionedStep(FusedStep):
    """Stages 1 and 2: norm, one pass per group, all-gather of the weights.

    With one process there is nothing to reduce, and the gradients stay where autograd leaves them.
    DeepSpeed would copy each into a bucket, divide it by one and copy it back twice: 16 bytes per
    parameter in bf16, with a Python hook for each.

    Args:
        engine, limit, guard: of ``FusedStep``.
        reduces: several processes: whether this step adds up their gradients, by one reduce-scatter
            per group when the backward pass is over. DeepSpeed does it during the backward pass, in
            hooks that a CUDA graph does not run. Each process then leaves its share of the mean in
            its parameters.

    Attributes:
        gradients: for each group the whole gradient of this process, laid out like the group's
            weights, with their padding. Empty if this step adds up nothing.
    """

    def __init__(self, engine, limit: float, guard: UpdateGuard, reduces: bool = False):
        super().__init__(engine, limit, guard)
        zero = self.zero
        alone = _is_alone(zero.dp_process_group)
        # gradients that accumulate in another dtype are left to DeepSpeed, which converts them, as are
        # those that a user's JSON has it convert or scale on their way
        unchanged = zero.gradient_accumulation_dtype == zero.dtype
        sent_unchanged = (
            zero.communication_data_type == zero.dtype
            and zero.postscale_gradients
            and zero.gradient_predivide_factor == 1
        )
        self.takes_gradients = unchanged and (alone or (reduces and sent_unchanged))
        self.gradients: list[Tensor] = []
        # {id of a parameter: where ``gradients`` has its gradient}
        self._places: dict[int, Tensor] = {}
        if self.takes_gradients:
            engine.enable_backward_allreduce = False
            while zero._grad_acc_hooks:
                zero._grad_acc_hooks.pop().remove()
            if not alone:
                self._make_places()

    def _make_places(self) -> None:
        for flat, parameters in zip(
            self.zero.bit16_groups_flat, self.zero.bit16_groups, strict=True
        ):
            # zeros: nothing else writes the padding, which is added up as well
            gradient = torch.zeros_like(flat)
            self.gradients.append(gradient)
            for p in parameters:
                place = gradient.narrow(0, elements_between(flat, p), p.numel()).view(p.shape)
                self._places[id(p)] = place

    def places_of(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Where the gradients of these parameters are taken from, if this step takes them from places
        of their own: views of ``gradients``. Empty otherwise.
        """
        return [self._places[id(p)] for p in parameters] if self._places else []

    @torch.no_grad()
    def __call__(self, closure=None) -> None:
        zero = self.zero
        # DeepSpeed's count within the optimizer step: -1 is "no micro-step yet"
        zero.micro_step_id = -1
        zero.overflow = False
        groups = range(len(zero.bit16_groups))
        if self.takes_gradients and not self.gradients:
            gradients = [self._pieces(i) for i in groups]
            self._decide([piece for pieces in gradients for _, piece in pieces])
        else:
            part = self._reduced if self.takes_gradients else self._flat_gradient
            gradients = [part(i) for i in groups]
            self._decide(gradients, zero.dp_process_group)

        # clip, AdamW, EMA, and the rounded weights into this rank's part of the flat group
        for i, group in enumerate(zero.optimizer.param_groups):
            rank = dist.get_rank(group=zero.real_dp_process_group[i])
            master = zero.single_partition_of_fp32_groups[i]
            weights = zero.parallel_partitioned_bit16_groups[i][rank]
            zero.optimizer.update(master, gradients[i], group, weights)
            # frees the group's gradient before the next group is worked on
            gradients[i] = None

        # DeepSpeed's step does this after its first update; its accessors of the state read the
        # links
        zero._lazy_init_hp_params_optimizer_state()
        gather_weights(zero)

    def _pieces(self, i: int) -> Gradient:
        """Group i's gradients as the parameters have them, and where each begins in the flat
        weights.
        """
        flat = self.zero.bit16_groups_flat[i]
        parameters = self.zero.bit16_groups[i]
        pieces = [(elements_between(flat, p), gradient_of(p)) for p in parameters]
        # the pieces keep the gradients until the pass has read them
        self.zero.free_grad_in_param_list(parameters)
        return pieces

    def _reduced(self, i: int) -> Tensor:
        """This rank's part of the sum of group i's gradients over all processes, 1-d; collective."""
        zero = self.zero
        for p in zero.bit16_groups[i]:
            place = self._places[id(p)]
            # a graph has written it there already
            if p.grad is not place:
                place.copy_(gradient_of(p))
        zero.free_grad_in_param_list(zero.bit16_groups[i])
        group = zero.real_dp_process_group[i]
        flat = self.gradients[i]
        part = flat.chunk(dist.get_world_size(group))[dist.get_rank(group)]
        # in place: the other ranks' parts are not needed any more
        dist.reduce_scatter_fn(part, flat, group=group)
        return part

    def _flat_gradient(self, i: int) -> Tensor:
        """This rank's part of group i's gradient, 1-d. The parameters' own gradients are freed."""
        zero = self.zero
        gradients = zero.averaged_gradients[i]
        # where fp32 accumulates bf16 gradients, DeepSpeed has flattened them already
        flat = getattr(gradients, "flat_partition", None)
        flat = zero.flatten(gradients) if flat is None else flat.view(-1)
        expected = zero.single_partition_of_fp32_groups[i].numel()
        if flat.numel() != expected:
            raise RuntimeError(
                f"expected {expected} gradients for a partition of the masters, DeepSpeed left "
                f"{flat.numel()}: unsupported version?"
            )
        # DeepSpeed must hold no gradient of this group: ``flat`` is freed after its pass
        zero._release_preflattened_grad_buffers(i)
        zero.averaged_gradients[i] = None
        zero.all_grad_tensors[i] = None
        zero.free_grad_in_param_list(zero.bit16_groups[i])
        return flat


class Stage3Step(FusedStep):
    """Stage 3: norm, then one pass per sub-group.

    The gradients lie in one buffer, in the order of the sub-groups.
    """

    @torch.no_grad()
    def __call__(self, closure=None) -> None:
        zero = self.zero
        zero._pre_step()
        # weights that the backward pass left gathered would keep their old values
        zero._partition_all_parameters()
        zero.overflow = False
        masters = zero.fp32_partitioned_groups_flat
        gradients = zero.grad_partitions_flat_buffer.split([master.numel() for master in masters])
        # the order is an assumption about DeepSpeed: a wrong one would mix up parameters in silence
        for i, gradient in enumerate(gradients):
            if zero.averaged_gradients[i][0].data_ptr() != gradient.data_ptr():
                raise RuntimeError(
                    f"expected the gradients of sub-group {i} in DeepSpeed's flat buffer, they are "
                    "elsewhere: unsupported version?"
                )
        # the next backward pass fills it anew
        zero.averaged_gradients = {}
        self._decide(gradients, zero.dp_process_group)
        zero.zero_grad(set_to_none=True)
        for i, (master, gradient) in enumerate(zip(masters, gradients, strict=True)):
            group = zero.optimizer.param_groups[zero.sub_group_to_group_id[i]]
            zero.optimizer.update(master, gradient, group, zero.fp16_partitioned_groups_flat[i])
        # no timers to stop; no persistent parameters to gather, because their threshold is 0
        zero._post_step(set())


def release_accumulators(parameters: Iterable[Tensor]) -> None:
    """Detach the weights that DeepSpeed's maps to its masters hold, as a graph's capture needs it.

    DeepSpeed makes these slices when it is built. Autograd tracks them, which keeps the node alive
    that accumulates each parameter's gradient. The node belongs to the stream in which it was made:
    a backward pass in another stream, such as a capture's, makes that one wait.
    """
    for p in parameters:
        mapping = getattr(p, "_hp_mapping", None)
        if mapping is not None:
            mapping.lp_fragment = mapping.lp_fragment.detach()
