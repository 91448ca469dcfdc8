"""DeepSpeed's configuration: this engine's settings with the user's JSON over them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import NoReturn

import pydantic
import torch
from deepspeed.runtime.config import DeepSpeedConfig, DtypeEnum
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from sra_fast.config.schema import Config
from sra_fast.utils.registry import TARGETS
from sra_fast.zero.process_group import quiet_deepspeed

# what a JSON may set besides; anything else is a typo or contradicts how this engine trains
OTHER_KEYS = (
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "wall_clock_breakdown",
    "steps_per_print",
    "memory_breakdown",
    "dump_state",
    "zero_allow_untested_optimizer",
)
# likewise, each with an object as its value
OBJECT_KEYS = (
    "zero_optimization",
    "bf16",
    "fp16",
    "data_types",
    "comms_logger",
    "flops_profiler",
    "checkpoint",
    "compile",
    "activation_checkpointing",
    "aio",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "timers",
)
OWN_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
# options that DeepSpeed still has, and only to refuse them
REMOVED_ZERO_KEYS = {"legacy_stage1"}


class MergedConfig(dict):
    """DeepSpeed's configuration, which knows whether a user's JSON is part of it.

    Attributes:
        file: path of the user's JSON, or None.
    """

    file: str | None = None


def deepspeed_config(
    cfg: Config, micro: int, accumulation: int, path: str | None, cuda: bool
) -> MergedConfig:
    """DeepSpeed's configuration.

    Every default that changed between DeepSpeed versions, or that this engine relies on, is set
    explicitly.

    Args:
        cfg: the run's configuration.
        micro: images per process and forward pass.
        accumulation: micro-batches per optimizer step.
        path: of the user's JSON, or None.
        cuda: whether the run is on GPUs.

    Raises:
        ValueError: the JSON is missing or malformed, or contradicts the batch, clipping, precision
            or optimizer of ``cfg``.
    """
    ours = {
        "train_batch_size": cfg.train.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": cfg.optim.clip,
        "bf16": {"enabled": cfg.train.precision == "bf16", "check_grad_overflow": False},
        "fp16": {"enabled": False},
        "zero_optimization": {
            "stage": cfg.train.zero_stage,
            # one process has nothing to overlap, and DeepSpeed would still wait for the device
            # after every backward pass
            "overlap_comm": cuda and cfg.train.global_batch > micro * accumulation,
            "contiguous_gradients": True,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 200_000_000,
            # true hands out other parameters' masters through DeepSpeed's own accessors
            "round_robin_gradients": False,
            # only gathered parameters see the new EMA: persistent ones of the frozen teacher would
            # go stale
            "stage3_param_persistence_threshold": 0,
        },
        # the fused optimizer works on each flat partition as AdamW does
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        # on by default, and waits for the device twice per micro-step
        "timers": {"throughput": {"enabled": False}},
    }
    merged = MergedConfig(_merge(ours, _read_json(path)) if path else ours)
    merged.file = path or None
    if clips_itself(merged["zero_optimization"]["stage"], cfg):
        # DeepSpeed would clip a second time, with its own norm
        merged["gradient_clipping"] = 0.0
    return merged


def clips_itself(stage: int, cfg: Config) -> bool:
    """Whether this engine clips the gradients instead of DeepSpeed.

    DeepSpeed 0.19 reads the norm on the host for every parameter group (stages 1 and 2), or drops
    it (stage 0 in fp32).
    """
    return stage in (1, 2) or (stage == 0 and cfg.train.precision == "fp32")


def _read_json(path: str) -> dict:
    try:
        config = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"--deepspeed_config {path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"--deepspeed_config {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(
            f"--deepspeed_config {path} must hold one JSON object, got a {type(config).__name__}"
        )
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise ValueError(
                f"--deepspeed_config sets '{key}': the optimizer is set by optim.* here"
            )
    known = sorted((*OWN_KEYS, *OTHER_KEYS, *OBJECT_KEYS))
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise ValueError(f"--deepspeed_config has unknown keys {unknown}; known are {known}")
    for key in OBJECT_KEYS:
        if not isinstance(config.get(key, {}), dict) and config[key] != "auto":
            raise ValueError(f"--deepspeed_config: {key} must be an object, got {config[key]!r}")
    fields = DeepSpeedZeroConfig.model_fields
    known = set(fields) | {field.alias for field in fields.values() if field.alias}
    known -= REMOVED_ZERO_KEYS
    zero = config.get("zero_optimization", {})
    for key in zero if isinstance(zero, dict) else ():
        if key not in known:
            raise ValueError(f"--deepspeed_config has an unknown key zero_optimization.{key}")
    return config


def _merge(ours: dict, theirs: dict) -> dict:
    """``ours`` with the user's values over it; ``auto`` keeps ours."""
    merged = dict(ours)
    for key, value in theirs.items():
        if value == "auto":
            continue
        nested = isinstance(value, dict)
        if key in ours and nested != isinstance(ours[key], dict):
            expected = "a value" if nested else "an object"
            raise ValueError(f"--deepspeed_config: {key} must be {expected}, got {value}")
        if key in OWN_KEYS and value != ours[key]:
            raise ValueError(
                f"--deepspeed_config sets {key} {value}, the configuration gives {ours[key]}"
            )
        if key in ("bf16", "fp16"):
            enabled = value.get("enabled", "auto")
            if enabled not in ("auto", ours[key]["enabled"]):
                raise ValueError(
                    f"--deepspeed_config sets {key}.enabled {enabled}: set train.precision instead"
                )
        merged[key] = _merge(ours[key], value) if nested and key in ours else value
    return merged


def zero_stage(ds_config: MergedConfig, cfg: Config) -> int:
    """The stage after merging, checked against what the teacher needs, and a user's JSON against
    what DeepSpeed takes; ValueError otherwise.
    """
    zero = ds_config["zero_optimization"]
    stage = zero["stage"]
    # true is equal to 1
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")
    if zero["round_robin_gradients"]:
        raise ValueError(
            "zero_optimization.round_robin_gradients must be false: it returns other parameters' data"
        )
    if not zero.get("compute_grad_norm", True):
        raise ValueError(
            "zero_optimization.compute_grad_norm must be true: the norm is clipped and logged"
        )
    for name in ("offload_optimizer", "offload_param", "cpu_offload"):
        if zero.get(name) not in (None, False) and zero.get(name) != {"device": "none"}:
            raise ValueError(
                f"zero_optimization.{name} is not supported: the EMA reads the masters on the device"
            )
    if stage == 3 and zero["stage3_param_persistence_threshold"] != 0:
        raise ValueError(
            "zero_optimization.stage3_param_persistence_threshold must be 0: the teacher would go stale"
        )
    has_network = any(TARGETS[a.target].has_network(a) for a in cfg.alignments.values())
    if has_network and (
        zero.get("zero_hpz_partition_size", 1) > 1
        or zero.get("zero_quantized_nontrainable_weights")
    ):
        raise ValueError(
            "zero_optimization.zero_hpz_partition_size above 1 and "
            "zero_quantized_nontrainable_weights are not supported with a teacher: DeepSpeed "
            "copies frozen weights once, so that it would go stale"
        )
    if ds_config.file is not None:
        _check_as_deepspeed(ds_config)
    return stage


def _check_as_deepspeed(ds_config: MergedConfig) -> None:
    """ValueError for what DeepSpeed refuses, as far as it shows before an engine is built: until
    then no run folder is made.
    """
    # it reports what it reads
    quiet_deepspeed()
    # the number of processes is not known to it yet: it would contradict the batch
    held = {key: deepcopy(value) for key, value in ds_config.items() if key != "train_batch_size"}
    with refusals_named(ds_config):
        read = DeepSpeedConfig(held)
        accumulated = read.grad_accum_dtype and DtypeEnum(read.grad_accum_dtype).value
    stage = read.zero_optimization_stage
    every = read.steps_per_print
    if every is not None and (type(every) is not int or every < 1):
        _refuse("steps_per_print", "null or a whole number of at least 1", every)
    for section, key in (
        (read.bfloat16_config, "bf16_master_weights_and_grads"),
        (read.float16_config, "fp16_master_weights_and_grads"),
    ):
        if getattr(section, key):
            _refuse(f"{key[:4]}.{key}", "false: the masters and the EMA are fp32", True)
    if stage == 3 and read.zero_config.module_granularity_threshold > 0:
        # gathered by DeepSpeed as a whole, a module's weights would be missing in its parts
        _refuse(
            "zero_optimization.stage3_module_granularity_threshold",
            "0: each block is gathered as a whole",
            read.zero_config.module_granularity_threshold,
        )
    # DeepSpeed's engine looks at the rest, but only when the model is there
    if stage in (2, 3) and read.zero_config.reduce_scatter:
        unless = f"at stage {stage} unless zero_optimization.reduce_scatter is false"
        if read.prescale_gradients:
            _refuse("prescale_gradients", f"false {unless}", read.prescale_gradients)
        if read.gradient_predivide_factor != 1:
            _refuse("gradient_predivide_factor", f"1 {unless}", read.gradient_predivide_factor)
    own = torch.bfloat16 if read.bfloat16_config.enabled else torch.float32
    if stage == 0 and accumulated not in (None, own):
        _refuse("data_types.grad_accum_dtype", f"{own} at stage 0, as the model", accumulated)


def refuse_for_graph(ds_config: MergedConfig, own: str, world: int) -> None:
    """ValueError for what a CUDA graph of the step excludes in a user's JSON: DeepSpeed converts or
    scales gradients, and looks into passes, in hooks that a replay does not run.

    ``own``: the model's dtype, ``train.precision``.
    """
    timers = ds_config["timers"].get("throughput", {})
    profiler = ds_config.get("flops_profiler", {})
    off = {
        "wall_clock_breakdown": ds_config["wall_clock_breakdown"],
        "timers.throughput.enabled": timers.get("enabled"),
        "flops_profiler.enabled": profiler.get("enabled"),
    }
    for option, value in off.items():
        if value:
            _refuse(option, "false with train.graph", value)
    accumulated = ds_config.get("data_types", {}).get("grad_accum_dtype")
    if accumulated not in (None, own):
        _refuse("data_types.grad_accum_dtype", f"{own} with train.graph", accumulated)
    if world == 1:
        # nothing is sent
        return
    sent = ds_config.get("communication_data_type")
    if sent not in (None, own):
        _refuse("communication_data_type", f"{own} with train.graph", sent)
    if ds_config.get("prescale_gradients"):
        _refuse("prescale_gradients", "false with train.graph", True)
    divided = ds_config.get("gradient_predivide_factor", 1)
    if divided != 1:
        _refuse("gradient_predivide_factor", "1 with train.graph", divided)


def _refuse(option: str, expected: str, found: object) -> NoReturn:
    raise ValueError(f"--deepspeed_config: {option} must be {expected}, got {found!r}")


@contextmanager
def refusals_named(ds_config: dict) -> Iterator[None]:
    """Where DeepSpeed reads its configuration: what it raises about a user's JSON becomes a
    ValueError that names the file.

    Its refusals are of many types, plain ``Exception`` and ``AssertionError`` among them. Memory,
    devices, other processes and missing packages have types of their own, which pass.
    """
    file = getattr(ds_config, "file", None)
    try:
        yield
    except Exception as error:
        # a refusal may be a NotImplementedError, which is a RuntimeError as well
        of_machine = isinstance(error, RuntimeError | MemoryError | OSError | ImportError)
        if file is None or (of_machine and not isinstance(error, NotImplementedError)):
            raise
        raise ValueError(
            f"DeepSpeed refuses --deepspeed_config {file}: {_first_reason(error)}"
        ) from error


def _first_reason(error: Exception) -> str:
    """One line about what DeepSpeed refuses."""
    if isinstance(error, pydantic.ValidationError):
        # the first line of its text only counts the faults
        fault = error.errors()[0]
        option = ".".join(str(part) for part in fault["loc"])
        return f"{option}: {fault['msg']}, got {fault['input']!r}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
