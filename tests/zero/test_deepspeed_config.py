"""What DeepSpeed refuses of a user's JSON is one line that names the file; other errors stay."""

import json

import pytest
import torch
from tiny_config import config

from sra_fast.training.plan import make_plan
from sra_fast.training.trainer import build
from sra_fast.zero.deepspeed_config import MergedConfig, refusals_named
from sra_fast.zero.process_group import init_distributed


def of_user(file: str | None) -> MergedConfig:
    merged = MergedConfig()
    merged.file = file
    return merged


def test_what_only_an_engine_finds_out(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}))
    plan = make_plan(config("--train.zero_stage", "1"), str(file))
    with pytest.raises(ValueError, match=f"^DeepSpeed refuses --deepspeed_config {file}: Zenflow"):
        build(plan, init_distributed())


@pytest.mark.parametrize(
    "error, reason",
    [
        (Exception("first\nsecond"), "first"),
        (AssertionError(), "AssertionError"),
        (NotImplementedError("a mix"), "a mix"),
        (TypeError("x"), "x"),
    ],
)
def test_refusals_of_every_type(error, reason):
    with pytest.raises(ValueError) as refused, refusals_named(of_user("ds.json")):
        raise error
    assert str(refused.value) == f"DeepSpeed refuses --deepspeed_config ds.json: {reason}"
    assert refused.value.__cause__ is error


@pytest.mark.parametrize(
    "error, file",
    [
        (torch.OutOfMemoryError("x"), "ds.json"),
        (torch.distributed.DistBackendError("x"), "ds.json"),
        (MemoryError(), "ds.json"),
        (OSError(28, "x"), "ds.json"),
        (ModuleNotFoundError("x"), "ds.json"),
        (KeyboardInterrupt(), "ds.json"),
        (AssertionError("x"), None),
    ],
)
def test_what_is_not_about_a_users_file_passes(error, file):
    with pytest.raises(BaseException) as raised, refusals_named(of_user(file)):
        raise error
    assert raised.value is error
