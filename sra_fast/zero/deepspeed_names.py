"""Every private name of DeepSpeed 0.19 that this engine uses, in one place.

The fused optimizer step, the sharded EMA and the master weights read what DeepSpeed's ZeRO
optimizers hold. None of it is a public interface. When DeepSpeed changes, ``check_names`` says at
start which name is missing, and ``tests/zero/test_deepspeed_names.py`` says it before.
"""

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module

import torch

# attributes of engine.optimizer, by the class of ZeRO optimizer
FP32_STAGE_0 = ("param_groups", "register_step_pre_hook", "step")
BF16_STAGE_0 = (
    "_global_grad_norm",
    "fp16_groups",
    "fp32_groups",
    "optimizer",
    "overflow",
    "step",
    "zero_grad",
)
STAGE_1_AND_2 = (
    "_global_grad_norm",
    "_grad_acc_hooks",
    "_lazy_init_hp_params_optimizer_state",
    "_release_preflattened_grad_buffers",
    "all_grad_tensors",
    "allgather_bucket_size",
    "averaged_gradients",
    "bit16_groups",
    "bit16_groups_flat",
    "communication_data_type",
    "dp_process_group",
    "flatten",
    "free_grad_in_param_list",
    "gradient_accumulation_dtype",
    "gradient_predivide_factor",
    "micro_step_id",
    "nccl_start_alignment_factor",
    "optimizer",
    "overflow",
    "parallel_partitioned_bit16_groups",
    "postscale_gradients",
    "real_dp_process_group",
    "single_partition_of_fp32_groups",
    "step",
)
# stage 1 with fp32 accumulation of bf16 gradients, which keeps DeepSpeed's own step
BF16_OPTIMIZER = (
    "bf16_groups",
    "bf16_groups_flat",
    "fp32_groups_flat_partition",
    "optimizer",
    "overflow",
    "step",
    "update_lp_params",
)
STAGE_3 = (
    "_partition_all_parameters",
    "_post_step",
    "_pre_step",
    "averaged_gradients",
    "dp_process_group",
    "fp16_groups",
    "fp16_partitioned_groups_flat",
    "fp32_partitioned_groups_flat",
    "grad_partitions_flat_buffer",
    "optimizer",
    "overflow",
    "step",
    "sub_group_to_group_id",
    "zero_grad",
)
# module that holds the `linear` that stage 3 puts into torch.nn.functional
STAGE_3_LINEAR = "deepspeed.runtime.zero.linear"


def names_of(optimizer: object, stage: int) -> tuple[str, ...]:
    """The names that this engine needs of DeepSpeed's optimizer of a ZeRO stage."""
    if stage == 3:
        return STAGE_3
    if hasattr(optimizer, "bf16_groups_flat"):
        return BF16_OPTIMIZER
    if stage in (1, 2):
        return STAGE_1_AND_2
    return FP32_STAGE_0 if isinstance(optimizer, torch.optim.Optimizer) else BF16_STAGE_0


def check_names(optimizer: object, stage: int) -> None:
    """RuntimeError that lists the names that DeepSpeed's optimizer lacks."""
    missing = [name for name in names_of(optimizer, stage) if not hasattr(optimizer, name)]
    if missing:
        raise RuntimeError(
            f"expected the ZeRO stage {stage} optimizer of DeepSpeed 0.19, this version's "
            f"{type(optimizer).__name__} has no {', '.join(missing)}"
        )


def restore_linear() -> None:
    """Undo what an earlier stage 3 of this process left: DeepSpeed's ``linear`` in PyTorch.

    Compiled, or under selective checkpointing, it gives wrong gradients without an error
    (torch 2.11).
    """
    if torch.nn.functional.linear.__module__ == STAGE_3_LINEAR:
        torch.nn.functional.linear = torch._C._nn.linear


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon with its functions as they are.

    DeepSpeed imports it to look at the type of any optimizer, and ``torch.compile`` in front of
    three functions imports Inductor, which takes a second of a start. This engine does not train
    with Muon; other code of this process that does has it uncompiled.
    """
    # whatever is wrong with it, DeepSpeed says it when it imports it itself
    with suppress(Exception):
        compiler = import_module("deepspeed.runtime.compiler")
        decorator = compiler.compile
        compiler.compile = _leave
        try:
            import_module("deepspeed.runtime.zero.muon.muon_optimizer")
        finally:
            compiler.compile = decorator


def _leave(*args, **kwargs) -> Callable:
    """A decorator, with or without arguments, that returns the function as it is."""
    return args[0] if args else lambda function: function
