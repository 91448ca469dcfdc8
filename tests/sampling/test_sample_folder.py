"""A folder belongs to one identity: what is refused, what resumes, and what is there already."""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from sra_fast.config.schema import SampleConfig
from sra_fast.models import SiT
from sra_fast.sampling import folder as of_folder
from sra_fast.sampling import parts
from sra_fast.sampling import run as script
from sra_fast.sampling.folder import SampleFolder

COUNT = 5


def folder(path, count=COUNT, with_pngs=False, **identity) -> SampleFolder:
    path.mkdir(exist_ok=True)
    return SampleFolder(path, {"seed": 0, **identity}, count, with_pngs)


def finish(made: SampleFolder, **origin) -> None:
    """What the first process leaves at the end."""
    (made.path / "samples.json").write_text(json.dumps({"identity": made.identity, **origin}))
    made.npz.write_bytes(b"images")
    if made.left_over():
        parts.delete_parts(made.parts)


def names(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*")}


def test_parts_of_other_samples_are_refused(tmp_path):
    settings = {"sample": {"interval": (0.0, 1.0), "steps": 2}}
    for _ in range(2):
        assert folder(tmp_path, **settings).open()
    with pytest.raises(ValueError, match="unfinished samples with seed 0, this run has 1: delete"):
        folder(tmp_path, **{**settings, "seed": 1}).open()
    settings["sample"]["steps"] = 3
    with pytest.raises(ValueError, match="unfinished samples with sample.steps 2, this run has 3"):
        folder(tmp_path, **settings).open()
    # parts of before something was noted
    with pytest.raises(ValueError, match="samples with path None, this run has linear"):
        SampleFolder(tmp_path, {"seed": 0, "path": "linear"}, COUNT, with_pngs=False).open()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "parts").write_text("")
    with pytest.raises(ValueError, match="out .* cannot be written: File exists"):
        folder(tmp_path).open()
    (tmp_path / "parts").unlink()
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/identity.json").write_text("{")
    with pytest.raises(ValueError, match="identity.json is no readable JSON file: .*; remove it"):
        folder(tmp_path).open()


def test_of_two_runs_that_start_together_one_gets_the_folder(tmp_path, monkeypatch):
    write_first = of_folder.write_first

    def write_second(path, value):
        write_first(path, {"seed": 1})
        write_first(path, value)

    monkeypatch.setattr(of_folder, "write_first", write_second)
    with pytest.raises(ValueError, match="unfinished samples with seed 1, this run has 0"):
        folder(tmp_path).open()


def test_images_of_others_are_refused(tmp_path):
    """Also those whose numbers these samples have too, and before anything is written."""
    png = tmp_path / "png"
    png.mkdir()
    for name in ("000004.png", "000005.png", "grid.png"):
        (png / name).write_bytes(b"")
    before = names(tmp_path)
    with pytest.raises(ValueError, match="holds 2 images that are not of these samples: delete it"):
        folder(tmp_path, 6, with_pngs=True).open()
    # new samples without PNGs would stand beside the old ones'
    with pytest.raises(ValueError, match="2 images that are not of these samples, which get none"):
        folder(tmp_path).open()
    assert names(tmp_path) == before
    for file in png.glob("0*.png"):
        file.unlink()
    assert folder(tmp_path, with_pngs=True).open()
    # the same command, which resumes
    (png / "000004.png").write_bytes(b"")
    assert folder(tmp_path, with_pngs=True).open()
    (png / "000005.png").write_bytes(b"")
    with pytest.raises(ValueError, match="holds 1 images that are not of these samples: delete it"):
        folder(tmp_path, with_pngs=True).open()
    assert folder(tmp_path / "other").open()
    assert names(tmp_path / "other") == {"parts", "parts/identity.json"}


def test_finished_samples_are_kept(tmp_path):
    made = folder(tmp_path)
    assert made.open()
    finish(made, checkpoint="runs/a")
    before = names(tmp_path)
    assert not folder(tmp_path).open()
    with pytest.raises(ValueError) as error:
        folder(tmp_path, seed=1).open()
    assert str(error.value) == (
        f"{made.npz} holds samples of runs/a with seed 0, this run has 1: delete it or choose "
        "another --out"
    )
    assert names(tmp_path) == before
    # nobody knows whose they are
    for held in ("[]", "{}", None):
        (tmp_path / "samples.json").unlink()
        if held is not None:
            (tmp_path / "samples.json").write_text(held)
        with pytest.raises(ValueError, match="no .*samples.json says that it is of these samples"):
            folder(tmp_path).open()
    made.npz.unlink()
    assert folder(tmp_path).open()


def test_pngs_that_were_deleted_are_missed(tmp_path):
    made = folder(tmp_path, with_pngs=True)
    assert made.open()
    for number in range(COUNT):
        (made.png / f"{number:06d}.png").write_bytes(b"")
    finish(made)
    assert not folder(tmp_path, with_pngs=True).open()
    (made.png / "000003.png").unlink()
    with pytest.raises(ValueError, match="but 1 of its images are no longer in .*png: delete both"):
        folder(tmp_path, with_pngs=True).open()


@pytest.mark.parametrize("look", ["_images", "_begun", "finished"])
def test_a_process_that_starts_while_the_samples_are_finished(tmp_path, monkeypatch, look):
    """However far the others are between any two of its looks, it is done or resumes, and leaves
    nothing.
    """
    made = folder(tmp_path, with_pngs=True)
    assert made.open()
    late = folder(tmp_path, with_pngs=True)
    original = getattr(SampleFolder, look)

    def others_end(self):
        found = original(self)
        if self is late and not made.npz.exists():
            for number in range(COUNT):
                (made.png / f"{number:06d}.png").write_bytes(b"")
            finish(made)
        return found

    monkeypatch.setattr(SampleFolder, look, others_end)
    resumes = late.open()
    assert resumes == (look == "finished")
    if resumes:
        # the parts are gone, and it notices
        assert parts.make_parts(None, COUNT, late.parts, 0, 1, late.png, late.finished) == 0
    assert not late.parts.exists()


def test_a_process_that_starts_while_another_begins(tmp_path, monkeypatch):
    """The other's first images are not taken for those of other samples."""
    late = folder(tmp_path, with_pngs=True)
    begun = []

    def others_begin(self, look):
        found = look(self)
        if self is late and not begun:
            begun.append(True)
            other = folder(tmp_path, with_pngs=True)
            assert other.open()
            (other.png / "000000.png").write_bytes(b"")
        return found

    for name in ("_images", "_begun"):
        look = getattr(SampleFolder, name)
        monkeypatch.setattr(SampleFolder, name, lambda self, look=look: others_begin(self, look))
    assert late.open() and begun


# the program


@pytest.fixture
def weights(tmp_path) -> Path:
    return write_weights(tmp_path / "model.pt", seed=0)


def write_weights(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = SiT(8, 2, 1, 32, 2, 2, num_classes=10)
    for p in model.parameters():
        p.data.normal_(std=0.05)
    # nothing has to be assumed, so that no line says it
    args = argparse.Namespace(path_type="linear", num_classes=model.num_classes)
    torch.save({"ema": model.state_dict(), "args": args}, path)
    return path


def run_as(monkeypatch, weights, out, rank=0, world=1, **changed):
    """``sample.py`` as a process of several: four images, two parts."""
    monkeypatch.setattr(parts, "PART", 2)
    place = {"RANK": str(rank), "WORLD_SIZE": str(world)}
    monkeypatch.setattr(script.os, "environ", {**os.environ, **place})
    given = {
        "checkpoint": str(weights),
        "num_heads": 2,
        "out": str(out),
        "count": 4,
        "sample": SampleConfig("euler", 2),
    }
    return script.run(script.load_job(script.Options(**{**given, **changed})))


def contents(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def test_a_late_process_makes_nothing_again(weights, tmp_path, monkeypatch, caplog):
    """Process 1 is restarted with process 0, which finds all parts, and is slower than it."""
    out = tmp_path / "out"
    assert run_as(monkeypatch, weights, out, rank=1, world=2, png=True) is None
    assert run_as(monkeypatch, weights, out, rank=0, world=2, png=True)["count"] == 4
    before = contents(out)
    assert "samples.npz" in before and len(before) == 4 + 3
    assert run_as(monkeypatch, weights, out, rank=1, world=2, png=True) is None
    assert contents(out) == before and not (out / "parts").exists()
    # the next command is not hindered
    assert not caplog.records
    assert run_as(monkeypatch, weights, out, png=True)["images_per_s_per_process"] == 0
    assert "holds these samples already, none is made again" in caplog.text
    assert contents(out) == before


def test_the_same_command_again_draws_the_grid_anew(weights, tmp_path, monkeypatch):
    run_as(monkeypatch, weights, tmp_path / "out")
    before = contents(tmp_path / "out")
    run_as(monkeypatch, weights, tmp_path / "out", scale=3, grid=2)
    after = contents(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == {"samples.png"}
    run_as(monkeypatch, weights, tmp_path / "large", scale=3, grid=2)
    assert contents(tmp_path / "large")["samples.png"] == after["samples.png"]


def test_samples_of_before_there_was_a_shift_of_times_are_the_same(
    weights, tmp_path, monkeypatch, caplog
):
    """But those at shifted times are others, in both directions."""
    out = tmp_path / "out"
    run_as(monkeypatch, weights, out)
    file = out / "samples.json"
    held = json.loads(file.read_text())
    assert held["identity"].pop("time_shift") is None
    file.write_text(json.dumps(held))
    before = contents(out)
    run_as(monkeypatch, weights, out)
    assert "holds these samples already, none is made again" in caplog.text
    assert contents(out) == before
    shifted = SampleConfig("euler", 2, time_shift=3.0)
    with pytest.raises(ValueError, match="with time_shift None, this run has 3.0: delete it or"):
        run_as(monkeypatch, weights, out, sample=shifted)
    run_as(monkeypatch, weights, tmp_path / "shifted", sample=shifted)
    with pytest.raises(ValueError, match="with time_shift 3.0, this run has None: delete it or"):
        run_as(monkeypatch, weights, tmp_path / "shifted")


def test_parts_that_a_crash_has_left_are_deleted(weights, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(parts, "delete_parts", lambda folder: exit("killed"))
    with pytest.raises(SystemExit):
        run_as(monkeypatch, weights, out)
    assert {path.name for path in out.iterdir()} == {"parts", "samples.json", "samples.npz"}
    whole = (out / "samples.npz").read_bytes()
    run_as(monkeypatch, weights, out)
    assert {path.name for path in out.iterdir()} == {"samples.json", "samples.npz", "samples.png"}
    assert (out / "samples.npz").read_bytes() == whole


def test_samples_of_another_model_are_not_replaced(weights, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run_as(monkeypatch, weights, out, png=True)
    before = contents(out)
    other = write_weights(tmp_path / "other.pt", seed=1)
    for changed, what in (
        ({"checkpoint": str(other)}, f"samples of {weights} with weights "),
        ({"num_heads": 4}, "with model.num_heads 2, this run has 4"),
        ({"png": False}, "with png True, this run has False"),
    ):
        with pytest.raises(ValueError, match=f"samples.npz holds .*{what}"):
            run_as(monkeypatch, weights, out, **{"png": True, **changed})
    assert contents(out) == before and not (out / "parts").exists()


def test_a_refused_command_does_not_block_the_folder(weights, tmp_path, monkeypatch):
    out = tmp_path / "out"
    (out / "png").mkdir(parents=True)
    (out / "png/000000.png").write_bytes(b"")
    with pytest.raises(ValueError, match="1 images that are not of these samples"):
        run_as(monkeypatch, weights, out, png=True)
    (out / "png/000000.png").unlink()
    run_as(monkeypatch, weights, out, seed=1)
    assert np.load(out / "samples.npz")["arr_0"].shape == (4, 8, 8, 1)
