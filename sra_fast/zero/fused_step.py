"""One pass over the memory in the place of DeepSpeed's ``step``: norm, then clip, AdamW, rounded weights and EMA at once.

DeepSpeed's own converts every gradient to fp32 (stages 1 and 2: twice), scales it in a pass of its own, and rounds the weights in
another. Bytes per parameter, EMA and teacher's copy included, counted on SiT-S/8 in bf16: 39.3 here at stage 1 on one process,
43.3 on several, 41.9 at stage 3; DeepSpeed's step with torch's AdamW 85.9.
"""

from collections.abc import Iterable

import deepspeed.comm as dist
import torch
from deepspeed.runtime.utils import all_gather_dp_groups
from torch import Tensor

from sra_fast.ops.adamw_ema import Gradient
from sra_fast.zero.optimizer import clip_factor


class OnePassStep:
    """Takes the place of ``step`` of DeepSpeed's ZeRO optimizer; the gradient norm is not read on the host.

    Args:
        engine: of a ZeRO stage of the subclass, with an ``AdamWEMA``.
        limit: of the global gradient norm, 0 for none.

    Raises:
        RuntimeError: this version of DeepSpeed keeps its gradients elsewhere.
    """

    needs: tuple[str, ...]

    def __init__(self, engine, limit: float):
        self.zero, self.limit = engine.optimizer, limit
        missing = [name for name in self.needs if not hasattr(self.zero, name)]
        if missing:
            raise RuntimeError(
                f"optim.implementation fused needs DeepSpeed 0.19's ZeRO optimizer, this one lacks {missing}: set it to torch"
            )
        self.zero.step = self

    def _set_clip_scale(self, gradients: list[Tensor], group=None) -> None:
        """From the norm of the whole gradient, of which each process of ``group`` has a part; fp32, on the device; NaN stays NaN."""
        squared = torch.stack(torch._foreach_norm(gradients, 2, torch.float32)).square().sum()
        if group is not None:
            dist.all_reduce(squared, group=group)
        self.zero._global_grad_norm = squared.sqrt()
        self.zero.optimizer.clip_scale = clip_factor(self.zero._global_grad_norm, self.limit)


class ReplicatedStep(OnePassStep):
    """Stage 0 in bf16: norm, one pass per parameter.  One process has nothing to average."""

    needs = ("fp16_groups", "fp32_groups", "overflow", "zero_grad")

    def __init__(self, engine, limit: float):
        super().__init__(engine, limit)
        if dist.get_world_size() == 1:
            engine.enable_backward_allreduce = False

    @torch.no_grad()
    def __call__(self, closure=None) -> None:
        zero = self.zero
        zero.overflow = False
        groups = [[gradient_of(p) for p in group] for group in zero.fp16_groups]
        self._set_clip_scale([gradient for group in groups for gradient in group])
        for settings, gradients, weights, masters in zip(
            zero.param_groups, groups, zero.fp16_groups, zero.fp32_groups, strict=True
        ):
            for gradient, p, master in zip(gradients, weights, masters, strict=True):
                zero.optimizer.update(master, gradient, settings, p.data)


def gradient_of(p: Tensor) -> Tensor:
    """What the backward pass has left; zero where it has not come by."""
    return torch.zeros_like(p) if p.grad is None else p.grad


class PartitionedStep(OnePassStep):
    """Stages 1 and 2: norm, one pass per group, all-gather of the weights.

    One process has nothing to reduce.  Its gradients stay where autograd leaves them: DeepSpeed would copy each into a bucket,
    divide it by one and copy it back twice, 16 bytes per parameter in bf16, with a hook in Python for each.
    """

    needs = ("averaged_gradients", "all_grad_tensors", "single_partition_of_fp32_groups", "parallel_partitioned_bit16_groups",
             "bit16_groups", "bit16_groups_flat", "real_dp_process_group", "dp_process_group", "nccl_start_alignment_factor",
             "allgather_bucket_size", "free_grad_in_param_list", "_release_preflattened_grad_buffers", "flatten", "micro_step_id",
             "overflow", "_lazy_init_hp_params_optimizer_state", "gradient_accumulation_dtype", "_grad_acc_hooks")  # fmt: skip

    def __init__(self, engine, limit: float):
        super().__init__(engine, limit)
        zero = self.zero
        # gradients that are to accumulate in another dtype are DeepSpeed's to convert
        self.alone = (
            dist.get_world_size(zero.dp_process_group) == 1
            and zero.gradient_accumulation_dtype == zero.dtype
        )
        if self.alone:
            engine.enable_backward_allreduce = False
            while zero._grad_acc_hooks:
                zero._grad_acc_hooks.pop().remove()

    @torch.no_grad()
    def __call__(self, closure=None) -> None:
        zero = self.zero
        zero.micro_step_id, zero.overflow = -1, False  # -1: no micro-step yet
        take = self._pieces if self.alone else self._flat_gradient
        gradients = [take(i) for i in range(len(zero.bit16_groups))]
        self._set_clip_scale(
            [piece for pieces in gradients for _, piece in pieces] if self.alone else gradients,
            None if self.alone else zero.dp_process_group,
        )
        for i, group in enumerate(zero.optimizer.param_groups):
            rank = dist.get_rank(group=zero.real_dp_process_group[i])
            master, weights = (
                zero.single_partition_of_fp32_groups[i],
                zero.parallel_partitioned_bit16_groups[i][rank],
            )
            zero.optimizer.update(master, gradients[i], group, weights)
            gradients[i] = None
        zero._lazy_init_hp_params_optimizer_state()
        all_gather_dp_groups(
            groups_flat=zero.bit16_groups_flat,
            partitioned_param_groups=zero.parallel_partitioned_bit16_groups,
            dp_process_group=zero.real_dp_process_group,
            start_alignment_factor=zero.nccl_start_alignment_factor,
            allgather_bucket_size=zero.allgather_bucket_size,
        )

    def _pieces(self, i: int) -> Gradient:
        """Group i's gradient as the parameters have it, and where each begins in the flat weights."""
        flat = self.zero.bit16_groups_flat[i]
        begin = lambda p: (p.data_ptr() - flat.data_ptr()) // flat.element_size()
        pieces = [(begin(p), gradient_of(p)) for p in self.zero.bit16_groups[i]]
        self.zero.free_grad_in_param_list(self.zero.bit16_groups[i])
        return pieces

    def _flat_gradient(self, i: int) -> Tensor:
        """This rank's part of group i's gradient, 1-d; the parameters' own gradients are freed."""
        zero = self.zero
        gradients = zero.averaged_gradients[i]
        flat = getattr(
            gradients, "flat_partition", None
        )  # there already where fp32 accumulates bf16 gradients
        flat = zero.flatten(gradients) if flat is None else flat.view(-1)
        expected = zero.single_partition_of_fp32_groups[i].numel()
        if flat.numel() != expected:
            raise RuntimeError(
                f"DeepSpeed left {flat.numel()} gradients for a partition of {expected}: unsupported version?"
            )
        zero._release_preflattened_grad_buffers(i)
        zero.averaged_gradients[i] = zero.all_grad_tensors[i] = None
        zero.free_grad_in_param_list(zero.bit16_groups[i])
        return flat


def let_go_of_accumulators(parameters: Iterable[Tensor]) -> None:
    """Detach the slices of the weights that DeepSpeed's maps to its masters hold, made anew when it loads a checkpoint.

    Autograd tracks them, and with them lives the node that accumulates each parameter's gradient, bound to the stream that was
    current then: a backward pass in another stream, such as a capture's, would make that one wait.
    """
    for p in parameters:
        mapping = getattr(p, "_hp_mapping", None)
        if mapping is not None:
            mapping.lp_fragment = mapping.lp_fragment.detach()


class Stage3Step(OnePassStep):
    """Stage 3: norm, one pass per sub-group; the gradients lie in one buffer in the order of the sub-groups."""

    needs = ("averaged_gradients", "grad_partitions_flat_buffer", "fp32_partitioned_groups_flat", "fp16_partitioned_groups_flat",
             "sub_group_to_group_id", "dp_process_group", "overflow", "_pre_step", "_partition_all_parameters", "_post_step",
             "zero_grad")  # fmt: skip

    @torch.no_grad()
    def __call__(self, closure=None) -> None:
        zero = self.zero
        zero._pre_step()
        zero._partition_all_parameters()
        zero.overflow = False
        masters = zero.fp32_partitioned_groups_flat
        gradients = zero.grad_partitions_flat_buffer.split([master.numel() for master in masters])
        for i, gradient in enumerate(gradients):
            if zero.averaged_gradients[i][0].data_ptr() != gradient.data_ptr():
                raise RuntimeError(
                    f"DeepSpeed keeps the gradients of sub-group {i} elsewhere: unsupported version?"
                )
        zero.averaged_gradients = {}
        self._set_clip_scale(gradients, zero.dp_process_group)
        zero.zero_grad(set_to_none=True)
        for i, (master, gradient) in enumerate(zip(masters, gradients, strict=True)):
            group = zero.optimizer.param_groups[zero.sub_group_to_group_id[i]]
            zero.optimizer.update(master, gradient, group, zero.fp16_partitioned_groups_flat[i])
        zero._post_step(set())
