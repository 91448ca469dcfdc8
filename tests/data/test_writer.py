"""Packing on a cluster: several processes, killed at any moment, restarted; disks that fill up."""

import errno
import os
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from toy_data import tree, write_latents

from sra_fast.data import layouts, ownership
from sra_fast.data.latents import Latents, PackedLatents, open_latents
from sra_fast.data.training_data import TrainingData
from sra_fast.data.writer import PackingJob, read_ahead, run_job
from sra_fast.utils import files


def make_job(data, out, layout="packed", rank=0, world=1, **changes) -> PackingJob:
    recipe = {
        "version": 2,
        "layout": layout,
        "source_sha256": data.fingerprint,
        "num_images": len(data),
        "num_classes": 3,
        "shape": [8, 4, 4],
        "vae": data.vae,
        "shard_size": 4,
        "dtype": "float16",
        **changes,
    }
    encode = lambda moments: moments
    return PackingJob(data, encode, recipe, out, batch=3, threads=2, rank=rank, world=world)


def begin(job: PackingJob) -> None:
    """What a process leaves that is killed before its first part is finished."""
    job.open_folder()
    job.ownership.release()


@pytest.fixture
def source(tmp_path):
    write_latents(tmp_path / "source", 10)
    return Latents(tmp_path / "source")


def in_child(run) -> int:
    """Wait status of a forked process that calls ``run``."""
    child = os.fork()
    if not child:
        try:
            run()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("layout", ["packed", "published"])
@pytest.mark.parametrize("order", [(1, 0), (2, 0, 1), (0, 1, 2, 3, 4)])
def test_any_number_of_processes_in_any_order_write_the_same(tmp_path, source, layout, order):
    assert run_job(make_job(source, tmp_path / "one", layout))
    finished = [
        run_job(make_job(source, tmp_path / "many", layout, rank, len(order))) for rank in order
    ]
    assert tree(tmp_path / "many") == tree(tmp_path / "one")
    parts = [rank for rank in order if rank < 3]  # ten images are three parts
    assert [bool(result) for result in finished] == [rank == parts[-1] for rank in order]


def kill_at(event: int, monkeypatch) -> None:
    """SIGKILL to this process just before its ``event``-th rename, or in the middle of writing an
    .npy file.
    """
    replace = os.replace
    save = layouts.save_npy
    left = event

    def reached() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    def killing_replace(temporary, path):
        if reached():
            os.kill(os.getpid(), signal.SIGKILL)
        replace(temporary, path)

    def killing_save(path, array):
        save(path, array)
        if reached():
            path.write_bytes(path.read_bytes()[:-8])
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(files.os, "replace", killing_replace)
    monkeypatch.setattr(layouts, "save_npy", killing_save)


@pytest.mark.parametrize("layout, events", [("packed", 10), ("published", 15)])
def test_killed_anywhere_and_started_again(tmp_path, source, layout, events, monkeypatch):
    """The next run keeps the finished parts and ends with the same files. Until then the folder is
    no data set.
    """
    run_job(make_job(source, tmp_path / "whole", layout))
    expected = tree(tmp_path / "whole")
    for event in range(events):
        out = tmp_path / f"killed{event}"

        def pack_until_killed(event=event, out=out):
            kill_at(event, monkeypatch)
            run_job(make_job(source, out, layout))

        status = in_child(pack_until_killed)
        assert os.WTERMSIG(status) == signal.SIGKILL
        with pytest.raises(
            ValueError, match="not finished" if event else "folder vae-sd|no .npy file"
        ):
            open_latents(out)
        # the second run must not write the finished shards again: their inodes stay
        kept = {part for part in range(3) if (out / f"parts/{part:05d}.json").exists()}
        inodes = {f: f.stat().st_ino for f in out.glob("shards/[0-9]*.npy") if int(f.stem) in kept}
        assert run_job(make_job(source, out, layout))
        assert all(f.stat().st_ino == inode for f, inode in inodes.items()), (
            "finished shards are not made again"
        )
        temporary = {name for name in tree(out) if name.endswith(".tmp")}
        finished = {name: data for name, data in tree(out).items() if name not in temporary}
        assert finished == expected
        assert not any(name.startswith(("shards/", "parts/", "vae-sd/0")) for name in temporary)

    # one event later nothing is left to interrupt: the loop has covered all of them
    def pack_uninterrupted():
        kill_at(events, monkeypatch)
        run_job(make_job(source, tmp_path / "last", layout))

    assert in_child(pack_uninterrupted) == 0
    assert tree(tmp_path / "last") == expected


def test_only_lost_shards_are_made_again(tmp_path, source):
    out = tmp_path / "out"
    run_job(make_job(source, out))
    expected = tree(out)
    (out / "shards/00000.npy").unlink()
    (out / "shards/00002.npy").write_bytes(b"short")
    kept = (out / "shards/00001.npy").stat()
    with pytest.raises(ValueError, match="00000.npy is missing; shards/00002.npy has 5 bytes"):
        PackedLatents(out)
    assert run_job(make_job(source, out))
    assert tree(out) == expected
    assert (out / "shards/00001.npy").stat().st_ino == kept.st_ino


def test_altered_shards_of_a_finished_set_are_made_again(tmp_path, source, caplog):
    """By the process that makes the part; the others are not written again."""
    out = tmp_path / "out"
    run_job(make_job(source, out))
    expected = tree(out)
    shard = out / "shards/00001.npy"
    altered = bytearray(shard.read_bytes())
    altered[-3:] = b"zzz"
    shard.write_bytes(altered)
    message = "00001.npy was altered .* Run the command that made the folder again to repair it$"
    with pytest.raises(ValueError, match=message):
        PackedLatents(out, verify=True).__getitems__([5])
    kept = {number: (out / f"shards/0000{number}.npy").stat().st_ino for number in (0, 2)}
    assert run_job(make_job(source, out, rank=0, world=2))
    assert tree(out) != expected
    assert run_job(make_job(source, out, rank=1, world=2))
    assert tree(out) == expected
    assert kept == {n: (out / f"shards/0000{n}.npy").stat().st_ino for n in kept}
    assert caplog.messages == [f"part 1 of {out} was altered and is made again"]


def test_lost_files_of_the_published_layout_are_made_again(tmp_path, source):
    out = tmp_path / "out"
    run_job(make_job(source, out, "published"))
    expected = tree(out)
    (out / "vae-sd" / layouts.PublishedLayout.name(1)).unlink()
    cut = out / "vae-sd" / layouts.PublishedLayout.name(6)
    cut.write_bytes(cut.read_bytes()[:-4])
    kept = out / "vae-sd" / layouts.PublishedLayout.name(8)
    before = kept.stat().st_mtime_ns
    assert run_job(make_job(source, out, "published"))
    assert tree(out) == expected
    assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "change",
    [
        {"vae": {"sha256": "other", "scaling_factor": 1.0}},
        {"dtype": "bfloat16"},
        {"shard_size": 5},
        {"source_sha256": "other"},
    ],
)
def test_a_folder_begun_with_another_recipe_is_refused(tmp_path, source, change):
    run_job(make_job(source, tmp_path / "out"))
    before = tree(tmp_path / "out")
    (key,) = change
    with pytest.raises(
        ValueError, match=f"was begun with {key} .*, this run has .*choose another out"
    ):
        run_job(make_job(source, tmp_path / "out", **change))
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("begun", ["packed", "published"])
@pytest.mark.parametrize("now", ["packed", "published"])
def test_until_a_part_is_finished_the_recipe_may_change(tmp_path, source, begun, now):
    """What the first command has left is gone: the folder is that of a fresh run."""
    out = tmp_path / "out"
    begin(make_job(source, out, begun, dtype="bfloat16", shard_size=2))
    left = {"packed": "shards/00004.npy", "published": "vae-sd/00000/img-mean-std-00000000.npy"}
    (out / left[begun]).parent.mkdir(exist_ok=True)
    (out / left[begun]).write_text("left by a killed process")
    run_job(make_job(source, out, now))
    run_job(make_job(source, tmp_path / "fresh", now))
    assert tree(out) == tree(tmp_path / "fresh")


def test_a_finished_set_without_records_keeps_its_recipe(tmp_path, source):
    out = tmp_path / "out"
    run_job(make_job(source, out))
    for file in (out / "parts").iterdir():
        file.unlink()
    before = tree(out)
    with pytest.raises(ValueError, match="was begun with dtype float16, .*: delete it or choose"):
        run_job(make_job(source, out, dtype="bfloat16"))
    assert tree(out) == before


def test_other_ranks_wait_until_rank_0_has_replaced_the_recipe(tmp_path, source, monkeypatch):
    out = tmp_path / "out"
    run = lambda rank: run_job(make_job(source, out, rank=rank, world=2, dtype="float32"))
    begin(make_job(source, out))
    with ThreadPoolExecutor() as pool:
        second = pool.submit(run, 1)
        time.sleep(0.3)
        assert not second.done()
        run(0)
        second.result()
    run_job(make_job(source, tmp_path / "fresh", dtype="float32"))
    assert tree(out) == tree(tmp_path / "fresh")

    # a rank that waits in vain says what it waits for
    monkeypatch.setattr(ownership, "PATIENCE", 0.2)
    begin(make_job(source, tmp_path / "other"))
    with pytest.raises(ValueError, match="was begun with dtype float16, this run has float32"):
        make_job(source, tmp_path / "other", rank=1, world=2, dtype="float32").open_folder()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_of_two_launches_at_once_one_gets_the_folder(tmp_path, source, dtype):
    out = tmp_path / "out"
    first = make_job(source, out, world=2)
    first.open_folder()
    message = f"another process writes into {out}: wait until it has ended, or choose another out"
    with pytest.raises(ValueError, match=message):
        make_job(source, out, dtype=dtype).open_folder()
    # the ranks of one launch share it
    run_job(make_job(source, out, rank=1, world=2))
    assert run_job(first)
    # it is free again, also after an error
    with pytest.raises(ValueError, match="was begun with dtype"):
        run_job(make_job(source, out, dtype="bfloat16"))
    assert run_job(make_job(source, out))


def test_where_locks_are_not_seen_two_recipes_are_not_mixed(tmp_path, source, monkeypatch):
    """The other launch takes the folder while we make the first part."""
    out = tmp_path / "out"

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(ownership.fcntl, "flock", no_locks)
    job = make_job(source, out)
    encode = job.encode

    def slow(moments):
        make_job(source, out, dtype="float32").open_folder()
        return encode(moments)

    job.encode = slow
    with pytest.raises(ValueError, match="was begun with dtype float32, this run has float16"):
        run_job(job)
    assert not any((out / "parts").iterdir())


def test_full_disk_is_one_error_and_the_next_run_resumes(tmp_path, source):
    """A real failure of write(2): the limit on a file's size lets an index pass, but no shard."""
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
        with pytest.raises(ValueError, match=f"cannot write {out}: File too large"):
            run_job(make_job(source, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert set(tree(out)) == {"preprocess.json"}, "no half-written file is left"
    run_job(make_job(source, tmp_path / "whole"))
    assert run_job(make_job(source, out))
    assert tree(out) == tree(tmp_path / "whole")


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path, source):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write .*file"):
        run_job(make_job(source, tmp_path / "file"))


class Given(TrainingData):
    """Ten given moments ``[10, 8, 4, 4]``."""

    fingerprint = "given"
    vae = None
    labels = torch.zeros(10, dtype=torch.int64)

    def __init__(self, moments):
        self.moments = moments

    def __getitems__(self, indices):
        return self.moments[indices], self.labels[indices]


@pytest.mark.parametrize(
    "value, dtype, message",
    [
        (7e4, "float16", "are not finite in torch.float16"),
        (float("nan"), "bfloat16", "are not finite in torch.bfloat16"),
        (float("inf"), "float32", "are not finite in torch.float32"),
        (-3.0, "float32", "must be standard deviations, found -3: are these logarithms"),
    ],
)
def test_values_that_cannot_be_moments_are_refused(tmp_path, value, dtype, message):
    moments = torch.rand(10, 8, 4, 4)
    moments[5, 6, 1, 2] = value
    with pytest.raises(ValueError, match=f"moments of images 4 .. 7.*{message}"):
        run_job(make_job(Given(moments), tmp_path / "out", dtype=dtype))
    assert (tmp_path / "out/shards/00000.npy").exists()
    assert not (tmp_path / "out/shards/00001.npy").exists()
    with pytest.raises(ValueError, match="moments of image 5.*(not finite|standard deviations)"):
        run_job(
            make_job(
                Given(moments.where(moments.abs() < 7e4, torch.nan)),
                tmp_path / "files",
                "published",
            )
        )
    assert not (tmp_path / "files/vae-sd/dataset.json").exists()


def test_both_layouts_into_each_other_bit_for_bit(tmp_path, source):
    """fp32 files -> fp32 shards -> files; then fp16 shards -> files -> shards of another size ->
    shards.
    """

    def convert(name, data, layout="packed", **changes):
        assert run_job(make_job(data, tmp_path / name, layout, **changes))
        return open_latents(tmp_path / name)

    everything = list(range(10))
    back = convert("back", convert("fp32", source, dtype="float32"), "published")
    assert back.files[0] == "00000/img-mean-std-00000000.npy"
    assert torch.equal(back.__getitems__(everything)[0], source.__getitems__(everything)[0])
    assert torch.equal(back.labels, source.labels)

    for dtype in ("float16", "bfloat16"):
        first = convert(dtype, source, dtype=dtype)
        unpacked = convert(f"{dtype}files", first, "published")
        other = convert(f"{dtype}other", unpacked, dtype=dtype, shard_size=3)
        convert(f"{dtype}again", other, dtype=dtype)
        a, b = (tree(tmp_path / name) for name in (dtype, f"{dtype}again"))
        assert sorted(a) == sorted(b)
        assert all(a[name] == b[name] for name in a if name.endswith(".npy")), "shards and labels"


def test_the_published_layout_keeps_the_vaes_identity(tmp_path, source):
    vae = {"sha256": "abc", "scaling_factor": 0.18215}
    run_job(make_job(source, tmp_path / "files", "published", vae=vae))
    assert open_latents(tmp_path / "files").vae == vae
    assert source.vae is None


class Counting(TrainingData):
    """Twelve images, of which image 7 cannot be read. ``seen`` lists the batches that were asked
    for.
    """

    fingerprint = "x"
    vae = None
    labels = torch.zeros(12, dtype=torch.int64)

    def __init__(self):
        self.seen = []

    def __len__(self):
        return 12

    def __getitems__(self, indices):
        self.seen.append(indices)
        if 7 in indices:
            raise ValueError("image 7 is bad")
        return torch.ones(len(indices), 8, 4, 4), self.labels[indices]


def test_a_bad_image_is_named_and_costs_one_part(tmp_path):
    data = Counting()
    with pytest.raises(ValueError, match="^image 7 is bad$"):
        run_job(make_job(data, tmp_path / "out"))
    assert sorted(data.seen)[0] == [0, 1, 2]
    assert (tmp_path / "out/parts/00000.json").exists()
    again = Counting()
    with pytest.raises(ValueError, match="image 7 is bad"):
        run_job(make_job(again, tmp_path / "out"))
    assert min(map(min, again.seen)) == 4, "the first shard is not read again"


def test_reading_ahead_keeps_the_order_and_is_bounded():
    started = []

    def read(i):
        started.append(i)
        return i

    batches = read_ahead(read, iter(range(100)), threads=3)
    assert next(batches) == 0
    assert len(started) <= 6
    assert list(batches) == list(range(1, 100))
    assert sorted(started) == list(range(100))


def test_files_of_others_are_not_overwritten(tmp_path, source):
    theirs = write_latents(tmp_path / "theirs", 4)
    before = tree(theirs)
    with pytest.raises(
        ValueError,
        match="theirs/vae-sd/.* was not made by this command, it would be lost: choose another out",
    ):
        run_job(make_job(source, tmp_path / "theirs", "published"))
    assert tree(theirs) == before


def test_of_two_jobs_that_start_together_one_gets_the_folder(tmp_path, source, monkeypatch):
    """The other job begins after we have looked at the folder and before we write our first
    file.
    """
    write_first = files.write_first
    other = make_job(source, tmp_path / "out", dtype="bfloat16")

    def write_second(path, value):
        write_first(tmp_path / "out/preprocess.json", other.recipe)
        write_first(path, value)

    monkeypatch.setattr(ownership, "write_first", write_second)
    with pytest.raises(ValueError, match="was begun with dtype bfloat16, this run has float16"):
        make_job(source, tmp_path / "out").open_folder()


def test_a_file_system_without_hard_links(tmp_path, source, monkeypatch):
    def link(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    make_job(source, tmp_path / "out").open_folder()
    assert [*tree(tmp_path / "out")] == ["preprocess.json"]
