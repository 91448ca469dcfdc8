"""DeepSpeed's configuration: this engine's settings with the user's JSON over them."""

import json
from pathlib import Path

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from sra_fast.config.schema import Config
from sra_fast.utils.registry import TARGETS

# what a JSON may set besides; anything else is a typo or contradicts how this engine trains
OTHER_KEYS = (
    "zero_optimization",
    "bf16",
    "fp16",
    "data_types",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "sparse_gradients",
    "comms_logger",
    "wall_clock_breakdown",
    "steps_per_print",
    "memory_breakdown",
    "dump_state",
    "flops_profiler",
    "zero_allow_untested_optimizer",
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


def deepspeed_config(
    cfg: Config, micro: int, accumulation: int, path: str | None, cuda: bool
) -> dict:
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
    merged = _merge(ours, _read_json(path)) if path else ours
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
    known = sorted((*OWN_KEYS, *OTHER_KEYS))
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise ValueError(f"--deepspeed_config has unknown keys {unknown}; known are {known}")
    fields = DeepSpeedZeroConfig.model_fields
    known = set(fields) | {field.alias for field in fields.values() if field.alias}
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
            enabled = value.get("enabled", False)
            if enabled not in ("auto", ours[key]["enabled"]):
                raise ValueError(
                    f"--deepspeed_config sets {key}.enabled {enabled}: set train.precision instead"
                )
        merged[key] = _merge(ours[key], value) if nested and key in ours else value
    return merged


def zero_stage(ds_config: dict, cfg: Config) -> int:
    """The stage after merging, checked against what the teacher needs; ValueError otherwise."""
    zero = ds_config["zero_optimization"]
    stage = zero["stage"]
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_optimization.stage must be 0, 1, 2 or 3, got {stage}")
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
    return stage
