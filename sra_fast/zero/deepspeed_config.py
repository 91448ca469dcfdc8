"""DeepSpeed's configuration: every default that changed between its versions, or that this engine relies on, set explicitly."""

import json
from pathlib import Path

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from sra_fast.config.schema import Config
from sra_fast.utils.registry import TARGETS

# what else a JSON may set; anything outside is a typo or contradicts how this engine trains
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
    """DeepSpeed's configuration: ours, with the user's JSON over it.

    Every default that changed between DeepSpeed versions, or that this engine relies on, is set explicitly.

    Raises:
        ValueError: the JSON is missing or malformed, or contradicts the batch, clipping, precision or optimizer of ``cfg``.
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
            # with it DeepSpeed waits for the device after every backward; one process has nothing to overlap
            "overlap_comm": cuda and cfg.train.global_batch > micro * accumulation,
            "contiguous_gradients": True,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 200_000_000,
            # true hands out other parameters' masters through DeepSpeed's own accessors
            "round_robin_gradients": False,
            # a persistent parameter of the frozen teacher would go stale: only gathered ones see the new EMA
            "stage3_param_persistence_threshold": 0,
        },
        "zero_allow_untested_optimizer": True,  # ours; it works on each flat partition like AdamW
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "timers": {
            "throughput": {"enabled": False}
        },  # on by default, and waits for the device twice per micro-step
    }
    merged = _merge(ours, _read_json(path)) if path else ours
    if clips_itself(merged["zero_optimization"]["stage"], cfg):
        merged["gradient_clipping"] = 0.0
    return merged


def clips_itself(stage: int, cfg: Config) -> bool:
    """Whether this engine clips the gradients: without a host sync, where DeepSpeed 0.19 reads the norm on the host for
    every parameter group (stages 1 and 2) or drops it (stage 0 in fp32)."""
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
    unknown = set(config) - set(OWN_KEYS) - set(OTHER_KEYS)
    if unknown:
        raise ValueError(
            f"--deepspeed_config has unknown keys {sorted(unknown)}; known are {sorted((*OWN_KEYS, *OTHER_KEYS))}"
        )
    known = DeepSpeedZeroConfig.model_fields
    aliases = {field.alias for field in known.values() if field.alias}
    zero = config.get("zero_optimization", {})
    for key in zero if isinstance(zero, dict) else ():
        if key not in known and key not in aliases:
            raise ValueError(f"--deepspeed_config has an unknown key zero_optimization.{key}")
    return config


def _merge(ours: dict, theirs: dict) -> dict:
    merged = dict(ours)
    for key, value in theirs.items():
        if value == "auto":
            continue
        if isinstance(ours.get(key), dict) != isinstance(value, dict) and key in ours:
            raise ValueError(
                f"--deepspeed_config: {key} must be {'an object' if isinstance(ours[key], dict) else 'a value'}, got {value}"
            )
        if key in OWN_KEYS and value != ours[key]:
            raise ValueError(
                f"--deepspeed_config sets {key} {value}, the configuration gives {ours[key]}"
            )
        if key in ("bf16", "fp16") and value.get("enabled", False) not in (
            "auto",
            ours[key]["enabled"],
        ):
            raise ValueError(
                f"--deepspeed_config sets {key}.enabled {value['enabled']}: set train.precision instead"
            )
        merged[key] = (
            _merge(ours[key], value)
            if isinstance(value, dict) and isinstance(ours.get(key), dict)
            else value
        )
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
    has_network = TARGETS[cfg.align.target].network_depth(cfg.align) is not None
    if has_network and (
        zero.get("zero_hpz_partition_size", 1) > 1
        or zero.get("zero_quantized_nontrainable_weights")
    ):
        raise ValueError(
            "zero_optimization.zero_hpz_partition_size above 1 and zero_quantized_nontrainable_weights are not supported with a "
            "teacher: DeepSpeed copies frozen weights once, so that it would go stale"
        )
    return stage
