"""Checkpoints of version 0.1: their weights are read, and a run does not resume them."""

import pytest
import torch
from foreign import network, old_run_folder, same, weights
from launch import call, error_of
from safetensors.torch import load_file
from tiny_config import TINY

from sra_fast.checkpoint import version_0_1
from sra_fast.checkpoint.load_model import load_model


def test_resuming_is_refused_with_the_command_that_works(tmp_path):
    model = network()
    run = old_run_folder(tmp_path / "runs/000", model)
    checkpoint = run / "checkpoints/step_00000007"
    for resume in ("auto", run, checkpoint):
        out = ("--train.out", tmp_path / "runs", "--train.resume", resume)
        done = call("train", *TINY, *out)
        assert done.returncode == 2
        said = error_of(done)
        assert f"{checkpoint} is a checkpoint of version 0.1, which cannot be resumed" in said
        assert f"sra-fast export --checkpoint {checkpoint} --out w.safetensors" in said
    out = tmp_path / "w.safetensors"
    assert call("export", "--checkpoint", checkpoint, "--out", out).returncode == 0
    assert same(load_file(out), weights(model))
    assert load_model(str(run)).step == 7


def test_a_pickle_beside_is_not_read(tmp_path):
    """What DeepSpeed wrote there, and anything else, stays closed."""
    run = old_run_folder(tmp_path, network())
    (run / "checkpoints/step_00000007/mp_rank_00_model_states.pt").write_bytes(b"no pickle")
    assert load_model(str(run)).step == 7


def test_the_newest_is_the_complete_one(tmp_path):
    assert version_0_1.newest(tmp_path) is None
    for step in (3, 6):
        (tmp_path / f"step_{step:08d}").mkdir()
        (tmp_path / f"step_{step:08d}" / version_0_1.STATE).write_text("{}")
    assert version_0_1.newest(tmp_path) is None, "without `latest` no save has finished"
    (tmp_path / "latest").write_text("step_00000003")
    assert version_0_1.newest(tmp_path).name == "step_00000003", "step 6 was interrupted"
    for text in ("", "step_00000099"):
        (tmp_path / "latest").write_text(text)
        assert version_0_1.newest(tmp_path).name == "step_00000006"


def test_latest_leads_nowhere_else(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / version_0_1.STATE).write_text("{}")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest").write_text("../elsewhere")
    assert version_0_1.newest(tmp_path / "checkpoints") is None


def test_a_missing_file_is_named(tmp_path):
    (tmp_path / version_0_1.STATE).write_text('{"step": 1, "world_size": 2}')
    torch.save({"a": (0, torch.zeros(3))}, tmp_path / "ema_rank_00000.pt")
    with pytest.raises(ValueError, match="ema_rank_00001.pt is missing or broken"):
        version_0_1.load_ema(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"step": "1", "world_size": 1}'])
def test_a_broken_state_is_named(tmp_path, text):
    (tmp_path / version_0_1.STATE).write_text(text)
    with pytest.raises(ValueError, match="sra_fast.json cannot be read"):
        version_0_1.step_of(tmp_path)


def test_files_fit_any_number_of_ranks(tmp_path):
    (tmp_path / version_0_1.STATE).write_text('{"step": 1, "world_size": 3}')
    values = torch.arange(7.0)
    for rank, (start, stop) in enumerate([(4, 7), (0, 1), (1, 4)]):
        torch.save({"a": (start, values[start:stop].clone())}, tmp_path / f"ema_rank_{rank:05d}.pt")
    assert torch.equal(version_0_1.load_ema(tmp_path)["a"], values)


@pytest.mark.parametrize(
    "content", [b"step_00000003\xdf", b"\xff\x00", b"..", b"step_3\0", b"x" * 5000]
)
def test_a_damaged_latest_names_nothing(tmp_path, content):
    (tmp_path / "latest").write_bytes(content)
    assert version_0_1.newest(tmp_path) is None
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    assert version_0_1.newest(tmp_path) is None
