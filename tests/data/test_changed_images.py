"""Images that are replaced under the same names are not mixed with those packed before."""

import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image
from toy_data import tree

from sra_fast.data.feature_jobs import check_same_images
from sra_fast.data.ownership import Ownership
from sra_fast.data.pixels import PackedPixels
from sra_fast.data.preprocess import Options, make_jobs, open_images
from sra_fast.data.writer import run_jobs

KINDS = ["folder", "zip", "tar"]
COUNT = 12


def put(root, kind: str, seed: int = 0, broken: tuple[int, ...] = ()) -> str:
    """Twelve random images of three classes, always under the same names; returns their source."""
    images = root / "images"
    shutil.rmtree(images, ignore_errors=True)
    rng = np.random.default_rng(seed)
    for number in range(COUNT):
        file = images / f"{number // 4}/{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
        if number in broken:
            file.write_bytes(file.read_bytes()[:40])
    if kind == "folder":
        return str(images)
    if kind == "zip":
        return shutil.make_archive(str(root / "images"), "zip", images)
    with tarfile.open(root / "images.tar", "w") as archive:
        for number in range(COUNT):
            archive.add(images / f"{number // 4}/{number}.png", f"{number}.png")
            label = root / "label"
            label.write_text(str(number // 4))
            archive.add(label, f"{number}.cls")
    return str(root / "images.tar")


def options_of(source: str, out, **changes) -> Options:
    options = {"pixels": True, "resolution": 8, "shard_size": 4, "batch": 2, "threads": 1}
    return Options(source, str(out), **{**options, **changes})


def pack(source: str, out, **changes) -> None:
    list(run_jobs(make_jobs(options_of(source, out, **changes))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mirror", [False, True])
def test_a_finished_set_of_other_images_is_refused(tmp_path, kind, mirror):
    out = tmp_path / "out"
    source = put(tmp_path, kind)
    pack(source, out, mirror=mirror)
    made = tree(out)
    # the same images in files that were written again
    pack(put(tmp_path, kind), out, mirror=mirror)
    put(tmp_path, kind, seed=1)
    message = f"{source}/.*0.png has changed since {out} was made of it: choose another out"
    with pytest.raises(ValueError, match=message):
        pack(source, out, mirror=mirror)
    assert tree(out) == made


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_set_is_not_finished_with_other_images(tmp_path, kind):
    out = tmp_path / "out"
    source = put(tmp_path, kind, broken=(5,))
    with pytest.raises(ValueError, match=r"5\.png is no"):
        pack(source, out)
    assert [file.name for file in (out / "parts").iterdir()] == ["00000.json"]
    put(tmp_path, kind, seed=1)
    with pytest.raises(ValueError, match=f"0.png has changed since {out} was made of it"):
        pack(source, out)
    # the image that was broken is mended: the part that has it was not made yet
    put(tmp_path, kind)
    pack(source, out)
    pack(source, tmp_path / "at_once")
    assert tree(out) == tree(tmp_path / "at_once")


def test_one_image_of_a_small_part_is_enough(tmp_path):
    source = put(tmp_path, "folder")
    pack(source, tmp_path / "out")
    Image.new("RGB", (8, 8)).save(tmp_path / "images/1/6.png")
    with pytest.raises(ValueError, match="1/6.png has changed since"):
        pack(source, tmp_path / "out")


def test_of_a_large_part_a_few_images_are_looked_at(tmp_path):
    source = put(tmp_path, "folder")
    pack(source, tmp_path / "out", shard_size=24, mirror=True)
    (part,) = [json.loads(f.read_text()) for f in (tmp_path / "out/parts").iterdir()]
    # of 24 numbers every third
    assert [number for number, _ in part["marks"]] == [*range(0, 24, 3)]


def test_images_that_were_skipped_are_no_change(tmp_path):
    out = tmp_path / "out"
    source = put(tmp_path, "folder", broken=(0, 5))
    pack(source, out, bad="skip")
    assert len(PackedPixels(out)) == 10
    made = tree(out)
    pack(source, out, bad="skip")
    assert tree(out) == made
    put(tmp_path, "folder", seed=1, broken=(0, 5))
    with pytest.raises(ValueError, match="1.png has changed since"):
        pack(source, out, bad="skip")


@pytest.mark.parametrize("broken", [0, 5, 9])
def test_after_a_stop_bad_images_may_be_skipped(tmp_path, broken):
    """Parts that were finished under stop are those of a run that skips: as if it had begun so."""
    out = tmp_path / "out"
    source = put(tmp_path, "folder", broken=(broken,))
    with pytest.raises(ValueError, match=rf"{broken}\.png is no readable image"):
        pack(source, out)
    finished = sorted(out.glob("shards/*.npy"))
    assert len(finished) == broken // 4
    kept = [file.stat().st_ino for file in finished]
    pack(source, out, bad="skip")
    pack(source, tmp_path / "fresh", bad="skip")
    assert tree(out) == tree(tmp_path / "fresh")
    assert [file.stat().st_ino for file in finished] == kept


def test_after_a_stop_the_resolution_may_change_until_a_part_is_finished(tmp_path):
    source = put(tmp_path, "folder", broken=(0, 4, 8))
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="no readable image"):
        pack(source, out)
    changes = {"resolution": 4, "bad": "skip"}
    pack(source, out, **changes)
    pack(source, tmp_path / "fresh", **changes)
    assert tree(out) == tree(tmp_path / "fresh")
    message = f"{out} was begun with shape .*: delete it or choose another out"
    with pytest.raises(ValueError, match=message):
        pack(source, out, bad="skip")


def test_what_was_skipped_is_not_kept_by_a_run_that_stops(tmp_path):
    out = tmp_path / "out"
    source = put(tmp_path, "folder", broken=(5,))
    pack(source, out, bad="skip")
    before = tree(out)
    message = "begun with bad skip, this run has stop: delete it or choose another out"
    with pytest.raises(ValueError, match=message):
        pack(source, out)
    assert tree(out) == before


def test_captions_that_were_stored_under_stop_are_not_those_of_skip(tmp_path):
    """No image was looked at for them."""
    recipe = {"kind": "text", "layout": "packed", "bad": "stop"}
    owner = Ownership(tmp_path, recipe, rank=0)
    owner.claim()
    owner.release()
    (tmp_path / "parts/00000.json").write_text("{}")
    message = "begun with bad stop, this run has skip: delete it or choose another text_name"
    with pytest.raises(ValueError, match=message):
        Ownership(tmp_path, {**recipe, "bad": "skip"}, rank=0).claim()


def test_held_out_images_are_looked_at_too(tmp_path):
    source = put(tmp_path, "folder")
    options = options_of(source, tmp_path / "out", holdout=0.25)
    jobs = make_jobs(options)
    list(run_jobs(jobs))
    name = jobs[0].source.names[1]
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    with pytest.raises(ValueError, match=f"{name} has changed since {tmp_path}/out/held_out "):
        list(run_jobs(make_jobs(options)))


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_not_added_to_a_set_of_other_images(tmp_path, kind):
    out = tmp_path / "out"
    source = put(tmp_path, kind)
    options = options_of(source, out, mirror=True)
    pack(source, out, mirror=True)
    check_same_images(open_images(options)[0], out)
    put(tmp_path, kind, seed=1)
    with pytest.raises(ValueError, match=f"0.png has changed since {out} was made of it"):
        check_same_images(open_images(options)[0], out)


def test_features_are_not_added_to_a_set_with_damaged_labels(tmp_path):
    out = tmp_path / "out"
    source = put(tmp_path, "folder")
    pack(source, out)
    (out / "labels.npy").write_text("no array")
    with pytest.raises(
        ValueError, match="labels.npy was altered .* it holds no plain array. Run the command"
    ):
        check_same_images(open_images(options_of(source, out))[0], out)


def test_a_set_of_an_earlier_version_is_finished(tmp_path):
    """Its records say nothing of the files."""
    out = tmp_path / "out"
    source = put(tmp_path, "folder", broken=(5,))
    with pytest.raises(ValueError, match="5.png"):
        pack(source, out)
    file = out / "parts/00000.json"
    record = json.loads(file.read_text())
    assert len(record.pop("marks")) == 4
    file.write_text(json.dumps(record))
    put(tmp_path, "folder")
    pack(source, out)
    assert len(PackedPixels(out)) == COUNT
    check_same_images(open_images(options_of(source, out))[0], out)


def test_arrays_have_no_files_to_look_at(tmp_path):
    """Their contents are in the fingerprint."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=images, arr_1=np.arange(4))
    source = str(tmp_path / "x.npz")
    pack(source, tmp_path / "out")
    assert "marks" not in json.loads((tmp_path / "out/parts/00000.json").read_text())
    pack(source, tmp_path / "out")
    np.savez(tmp_path / "x.npz", arr_0=255 - images, arr_1=np.arange(4))
    with pytest.raises(ValueError, match="was begun with source_sha256"):
        pack(source, tmp_path / "out")
