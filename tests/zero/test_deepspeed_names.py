"""The private names of DeepSpeed that the engine uses exist, and a missing one is named."""

import sys

import pytest
import torch
from deepspeed.runtime import compiler
from tiny_config import config

from sra_fast.training.plan import make_plan
from sra_fast.training.trainer import build
from sra_fast.zero import deepspeed_names
from sra_fast.zero.deepspeed_names import check_names, import_muon_uncompiled, names_of
from sra_fast.zero.process_group import init_distributed

STAGES = [
    (0, "fp32", deepspeed_names.FP32_STAGE_0),
    (0, "bf16", deepspeed_names.BF16_STAGE_0),
    (1, "bf16", deepspeed_names.STAGE_1_AND_2),
    (2, "fp32", deepspeed_names.STAGE_1_AND_2),
    (3, "bf16", deepspeed_names.STAGE_3),
]


@pytest.mark.parametrize("stage, precision, names", STAGES)
def test_this_deepspeed_has_every_name(stage, precision, names):
    args = ("--train.zero_stage", str(stage), "--train.precision", precision)
    trainer = build(make_plan(config(*args)), init_distributed())
    optimizer = trainer.engine.optimizer
    assert names_of(optimizer, stage) == names
    check_names(optimizer, stage)
    missing = [name for name in names if not hasattr(optimizer, name)]
    assert missing == []
    trainer.engine.destroy()


@pytest.mark.parametrize("stage", [1, 3])
def test_a_missing_name_is_told(stage):
    class OtherOptimizer:
        pass

    optimizer = OtherOptimizer()
    for name in names_of(optimizer, stage):
        setattr(optimizer, name, None)
    check_names(optimizer, stage)
    for name in ("averaged_gradients", "overflow"):
        delattr(optimizer, name)
    message = f"stage {stage} optimizer of DeepSpeed 0.19, this version's OtherOptimizer has no "
    with pytest.raises(RuntimeError, match=message + "averaged_gradients, overflow"):
        check_names(optimizer, stage)


def test_muon_is_imported_without_the_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: pytest.fail("compiled"))
    before = compiler.compile
    names = [name for name in sys.modules if "deepspeed.runtime.zero.muon." in name]
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    import_muon_uncompiled()
    assert "deepspeed.runtime.zero.muon.muon_optimizer" in sys.modules
    assert compiler.compile is before
    # another DeepSpeed may have no such name: then it imports what it likes
    monkeypatch.delattr(compiler, "compile")
    import_muon_uncompiled()


@pytest.mark.parametrize("decorate", [deepspeed_names._leave, deepspeed_names._leave()])
def test_functions_are_left_as_they_are(decorate):
    assert decorate(names_of) is names_of
