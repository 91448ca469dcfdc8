"""Files of a checkpoint: what is written is read back, and whatever was changed is found and named."""

import builtins
import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from foreign import write_checkpoint
from safetensors.torch import load_file

from sra_fast.checkpoint.manifest import (
    MANIFEST,
    file_name,
    hash_fault,
    read_manifest,
    size_fault,
    write_manifest,
)
from sra_fast.checkpoint.reading import read_kinds
from sra_fast.checkpoint.shards import Shards, piece_key, write_pieces
from sra_fast.checkpoint.signed_json import DamagedCheckpoint, render
from sra_fast.checkpoint.steps import cheap_fault, choose
from sra_fast.data.facts import DataFacts
from sra_fast.utils.files import plain

FACTS = plain(DataFacts("digits", (1, 8, 8), 10).as_json())
SETTINGS = {"align": {"milestones": {"2": 0.4, "10": 0.1}}, "optim": {"betas": [0.9, 0.999]}}
SIZES = {"blocks.0.weight": 12, "blocks.0.bias": 5, "head": 1}


def kinds_of(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        kind: {name: torch.randn(size, generator=generator) for name, size in SIZES.items()}
        for kind in ("master", "exp_avg", "exp_avg_sq", "ema.main")
    }


@pytest.fixture
def run(tmp_path):
    """Two checkpoints, of steps 3 and 6."""
    for step in (3, 6):
        write_checkpoint(tmp_path, kinds_of(step), step, SETTINGS)
    return tmp_path


def newest(run):
    return run / "checkpoints/step_00000006"


def any_fault(path) -> str | None:
    """Everything that a resumed run looks at."""
    fault = cheap_fault(path)
    if fault is not None:
        return fault
    manifest = read_manifest(path)
    return hash_fault(path, manifest, sorted(manifest.files))


def test_what_is_written_is_read_back(tmp_path):
    kinds = kinds_of(0)
    path = write_checkpoint(tmp_path, kinds, 1200, SETTINGS, FACTS)
    manifest, found = read_kinds(path, kinds)
    for kind, parameters in kinds.items():
        assert found[kind].keys() == parameters.keys()
        assert all(torch.equal(found[kind][name], value) for name, value in parameters.items())
    assert (manifest.step, manifest.settings, manifest.data) == (1200, SETTINGS, FACTS)
    # the safetensors library reads the whole file, too
    first = load_file(path / file_name(0))
    assert torch.equal(first["master/blocks.0.weight/0"], kinds["master"]["blocks.0.weight"][:6])


def test_any_part_is_read_from_any_pieces(tmp_path):
    values = torch.arange(100.0)
    cuts = [0, 1, 30, 31, 77, 100]
    for rank, (start, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
        pieces = {piece_key("master", "a", start): values[start:end]}
        write_pieces(tmp_path / file_name(rank), pieces)
    shards = Shards(tmp_path, [file_name(rank) for rank in range(5)])
    shards.check(["master"], {"a": 100})
    for start, end in ((0, 100), (0, 1), (29, 32), (50, 99), (99, 100)):
        out = torch.full((end - start,), float("nan"))
        shards.read_into("master", "a", start, out)
        assert torch.equal(out, values[start:end])


def test_an_empty_share_is_a_file_too(tmp_path):
    stored = write_pieces(tmp_path / file_name(0), {})
    assert os.path.getsize(tmp_path / file_name(0)) == stored.size
    assert Shards(tmp_path, [file_name(0)]).whole("master") == {}


@pytest.mark.parametrize(
    "pieces, message",
    [
        ([(0, 4), (5, 8)], "master of a lacks elements: 4 to 5"),
        ([(0, 4), (3, 8)], "master of a has elements twice: 3 to 4"),
        ([(1, 8)], "master of a lacks elements: 0 to 1"),
        ([(0, 7)], "a should have 8 elements, master has 7"),
        ([(0, 9)], "a should have 8 elements, master has 9"),
        ([], "lacks master of a"),
    ],
)
def test_pieces_that_are_missing_or_there_twice_are_named(tmp_path, pieces, message):
    held = {piece_key("master", "a", start): torch.zeros(end - start) for start, end in pieces}
    write_pieces(tmp_path / file_name(0), held)
    with pytest.raises(ValueError, match=message):
        Shards(tmp_path, [file_name(0)]).check(["master"], {"a": 8})


def test_a_parameter_that_the_model_lacks_is_named(tmp_path):
    write_pieces(tmp_path / file_name(0), {piece_key("master", "b", 0): torch.zeros(2)})
    with pytest.raises(ValueError, match="has besides master of b"):
        Shards(tmp_path, [file_name(0)]).check(["master"], {})


def test_every_flipped_byte_is_found_and_named(run):
    """Bytes of every file at seeded places: each flip is named, and step 3 is taken instead."""
    path = newest(run)
    draw = random.Random(0)
    for name in (MANIFEST, file_name(0), file_name(1)):
        whole = (path / name).read_bytes()
        places = (
            draw.sample(range(len(whole)), 60)
            if name == MANIFEST
            else draw.sample(range(len(whole)), 20)
        )
        for place in {0, 7, 8, len(whole) - 1, *places}:
            changed = bytearray(whole)
            changed[place] ^= 1 << draw.randrange(8)
            (path / name).write_bytes(bytes(changed))
            fault = any_fault(path)
            assert fault is not None and fault.startswith(name), (name, place, fault)
            choice = choose(path.parent, any_fault)
            assert choice is not None and choice.path.name == "step_00000003"
            # a manifest that is damaged tells of no parent
            assert len(choice.remarks) == 1 + (name == MANIFEST)
            said = choice.remarks[0]
            assert said.startswith(f"checkpoint step 6 is damaged: {name} ")
            assert said.endswith("; going on from step 3")
        (path / name).write_bytes(whole)
    assert any_fault(path) is None


def test_files_swapped_between_ranks_and_steps_are_found(run):
    path = newest(run)
    ours, other = path / file_name(0), path / file_name(1)
    ours_bytes, other_bytes = ours.read_bytes(), other.read_bytes()
    ours.write_bytes(other_bytes)
    other.write_bytes(ours_bytes)
    assert any_fault(path).startswith(file_name(0))
    ours.write_bytes(ours_bytes)
    other.write_bytes(other_bytes)
    for name in (file_name(1), MANIFEST):
        kept = (path / name).read_bytes()
        shutil.copy(run / "checkpoints/step_00000003" / name, path / name)
        assert any_fault(path).startswith(name)
        (path / name).write_bytes(kept)
    assert any_fault(path) is None


@pytest.mark.parametrize("name", [MANIFEST, file_name(0), file_name(1)])
@pytest.mark.parametrize("damage", ["half", "empty", "missing", "longer", "a folder"])
def test_files_that_are_cut_or_gone_are_named(run, name, damage):
    file = newest(run) / name
    data = file.read_bytes()
    file.unlink()
    if damage == "a folder":
        file.mkdir()
    elif damage != "missing":
        kept = {"half": data[: len(data) // 2], "empty": b"", "longer": data + b"\0"}
        file.write_bytes(kept[damage])
    assert any_fault(newest(run)).startswith(name)
    assert choose(run / "checkpoints", any_fault).path.name == "step_00000003"


@pytest.mark.parametrize(
    "field, value",
    [
        ("step", 10**9),
        ("step", -1),
        ("step", 6.0),
        ("step", True),
        ("shift", "0"),
        ("epoch", None),
        ("world", 3),
        ("world", 0),
        ("counts", [1.0, 0.0]),
        ("counts", ["many", 0, 0]),
        ("counts", [0.5, 0, 0]),
        ("counts", [float("inf"), 0, 0]),
        ("files", {"../step_00000003/rank_00000.safetensors": {"size": 1, "sha256": "0" * 64}}),
        ("files", {}),
        ("settings", []),
        ("data", 3),
        ("sampled", "other"),
        ("step", 2**53),
        ("shift", 2**53),
        ("world", 10**12),
        ("counts", [2.0**53, 0, 0]),
        ("counts", [1e400, 0, 0]),
        ("counts", [True, 0, 0]),
        ("counts", 3),
        ("files", []),
        ("settings", {"train": 3}),
        ("emas", {"main": 0.9}),
        ("scales", {"a": "1"}),
        ("scales", {"a": float("nan")}),
        ("versions", {"torch": 2}),
        ("parent", 6),
        ("parent", None),
        ("parent_digest", "0"),
        ("data", {"name": "digits"}),
        ("data", {**FACTS, "shape": [1, 8]}),
        ("data", {**FACTS, "shape": [1, 8, "8"]}),
        ("data", {**FACTS, "num_classes": "10"}),
        ("data", {**FACTS, "scale": float("inf")}),
        ("data", {**FACTS, "class_names": "ab"}),
    ],
)
def test_values_of_another_kind_are_refused_though_the_hash_holds(run, field, value):
    """Whoever edits a manifest and computes its hash again still gets no wrong run."""
    path = newest(run)
    held = json.loads((path / MANIFEST).read_text())["manifest"]
    (path / MANIFEST).write_text(render("manifest", {**held, field: value}))
    with pytest.raises(DamagedCheckpoint, match=MANIFEST):
        read_manifest(path)


@pytest.mark.parametrize(
    "changed",
    [
        {"emas": {"slow": {"decay": 0.9}}, "sampled": "slow", "teacher": "slow"},
        {"teacher": "slow"},
    ],
)
def test_other_emas_are_refused_by_name_and_not_passed_over(run, changed):
    path = newest(run)
    held = json.loads((path / MANIFEST).read_text())["manifest"]
    (path / MANIFEST).write_text(render("manifest", {**held, **changed}))
    with pytest.raises(ValueError, match="EMAs .*slow.* follows only 'main'"):
        choose(path.parent)


UNREADABLE = [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE]


@pytest.mark.parametrize("code", UNREADABLE)
@pytest.mark.parametrize("name", [MANIFEST, file_name(1)])
def test_what_could_not_be_read_is_not_called_damaged(run, monkeypatch, code, name):
    """The disk may be back in a minute: another checkpoint is not taken, nothing is moved."""
    path = newest(run)
    read = {"bytes": Path.read_bytes, "open": builtins.open}

    def failing(kind):
        def wrapped(file, *arguments, **options):
            if Path(file) == path / name:
                raise OSError(code, os.strerror(code), str(file))
            return read[kind](file, *arguments, **options)

        return wrapped

    monkeypatch.setattr(Path, "read_bytes", failing("bytes"))
    monkeypatch.setattr(builtins, "open", failing("open"))
    expected = f"{path / name} could not be read: {os.strerror(code)}; nothing was changed"
    for work in (lambda: choose(path.parent, any_fault), lambda: read_kinds(path, ["master"])):
        with pytest.raises(ValueError) as caught:
            work()
        assert str(caught.value) == expected and not isinstance(caught.value, DamagedCheckpoint)


@pytest.mark.parametrize("code", UNREADABLE)
def test_sizes_that_could_not_be_read(run, monkeypatch, code):
    path = newest(run)
    stat = Path.stat

    def failing(file, **options):
        if file == path / file_name(0):
            raise OSError(code, os.strerror(code), str(file))
        return stat(file, **options)

    monkeypatch.setattr(Path, "stat", failing)
    with pytest.raises(ValueError, match=r"could not be read: .*; nothing was changed"):
        choose(path.parent)


def test_a_reader_names_the_newest_whole_one(run):
    path = newest(run)
    data = bytearray((path / file_name(0)).read_bytes())
    data[-1] ^= 1
    (path / file_name(0)).write_bytes(bytes(data))
    whole = path.with_name("step_00000003")
    with pytest.raises(ValueError, match=f"SHA-256; the newest whole one before it is {whole}$"):
        read_kinds(path, ["master"])
    (whole / file_name(0)).unlink()
    with pytest.raises(ValueError, match="has another SHA-256; none before it is whole"):
        read_kinds(path, ["master"])


def test_a_later_format_is_refused_and_not_passed_over(run):
    path = newest(run)
    held = json.loads((path / MANIFEST).read_text())["manifest"]
    (path / MANIFEST).write_text(render("manifest", {**held, "format": 2}))
    with pytest.raises(ValueError, match="has the format 2 of another version"):
        choose(path.parent)


def test_the_text_does_not_depend_on_the_order_of_keys(run):
    path = newest(run)
    text = (path / MANIFEST).read_text()
    manifest = read_manifest(path)
    write_manifest(path, manifest)
    assert (path / MANIFEST).read_text() == text
    assert size_fault(path, manifest) is None


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_pieces(tmp_path / file_name(0), {piece_key("master", "a", 0): torch.zeros(3)})
    assert list(tmp_path.iterdir()) == []
