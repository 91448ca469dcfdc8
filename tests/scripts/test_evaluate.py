"""evaluate.py: samples and an FID reference in, a table and JSON out; what it refuses."""

import json
import sys

import numpy as np
import pytest
from launch import call, error_of, launch
from PIL import Image

from sra_fast.data.digits import Digits
from sra_fast.evaluation.scores import fit_gaussian, frechet_distance
from sra_fast.plots.report import to_uint8

FEATURES = """
def pixels(x):
    return x.flatten(1).float(), x.flatten(1)[:, :10].float() / 8

def eight(x):
    return x.reshape(len(x), 64).float()

def lost(x):
    return {}["weights"]

def later(x):
    return pixels(x) if len(x) == 1 else {}["weights"]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with images of digits and a module of features."""
    # evaluate.py appends the working directory to the path and imports the module from it
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "digit_pixels", raising=False)
    (tmp_path / "digit_pixels.py").write_text(FEATURES)
    np.savez(tmp_path / "ref.npz", to_uint8(Digits().images))
    np.savez(tmp_path / "samples.npz", to_uint8(Digits(held_out=True).images))
    np.savez(tmp_path / "large.npz", to_uint8(Digits().images).repeat(2, 1).repeat(2, 2))
    np.savez(tmp_path / "three.npz", to_uint8(Digits().images[:3]))
    # as ADM's files without images: one number is enough to tell the width
    np.savez(tmp_path / "adm.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    (tmp_path / "broken_code.py").write_text("def f(:")
    (tmp_path / "nothing").mkdir()
    return tmp_path


def test_scores_table_and_json(folder):
    args = "--samples samples.npz --reference ref.npz --features digit_pixels:pixels".split()
    done = launch("evaluate", *args, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "360/360" in done.stderr, "a progress bar"
    report = json.loads((folder / "scores.json").read_text())
    assert report["fid"] > 0
    assert report["sfid"] is None
    assert report["inception_score"] > 1
    assert 0.5 < report["precision"] < 1
    assert 0.5 < report["recall"] < 1
    reasons = "not comparable: other extractor; 360 samples instead of 50000; "
    assert report["comparable"]["fid"].startswith(reasons)
    assert report["samples"] == {"path": "samples.npz", "images": 360, "shape": [8, 8, 1]}
    assert report["reference"] == {
        "path": "ref.npz",
        "images": 1437,
        "shape": [8, 8, 1],
        "statistics": "of its images",
    }
    assert report["extractor"]["name"].startswith("digit_pixels.pixels-")
    assert report["extractor"]["dimensions"] == 64

    names = ["fid", "sfid", "inception_score", "precision", "recall"]
    first, *lines = done.stdout.splitlines()
    assert first == f"extractor: {report['extractor']['name']} (64 features)"
    assert [line.split()[0] for line in lines] == names
    assert f"{report['fid']:.4f}  not comparable: other extractor" in lines[0]
    assert "-  not computed" in lines[1]

    # the second time the reference's statistics come from the cache
    again = call("evaluate", *args, "--batch", 7, "--out", "again.json", cwd=folder)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "ref.npz:" not in again.stderr
    fid = json.loads((folder / "again.json").read_text())["fid"]
    assert fid == pytest.approx(report["fid"], rel=1e-6)


@pytest.mark.parametrize(
    "args, message",
    [
        ("", "95 628 359 bytes, SHA-256 6726825d0af5f729cebd58"),
        ("--inception a --features b", "give either features (pixels, a TorchScript file or"),
        (
            "--features {f} --samples nowhere.npz",
            "there is no nowhere.npz, expected an .npz file or a folder",
        ),
        ("--features {f} --samples nothere", "there is no nothere, expected an .npz file or a fol"),
        ("--features {f} --reference nothere", "there is no nothere, expected an .npz file or a"),
        ("--features {f} --samples three.npz", "samples must be more than 3 images, got 3"),
        ("--features {f} --manifold_images 0", "manifold_images must be more than 3"),
        ("--inception digit_pixels.py", "digit_pixels.py does not hold the weights of"),
        ("--features {f} --out no/scores.json", "out must be a file in a folder"),
        ("--features {f} --out /proc/scores.json", "/proc/scores.json"),
        (
            "--features digit_pixels:eight --reference large.npz",
            "failed on uint8 [1, 1, 16, 16]",
        ),
        (
            "--features {f} --reference large.npz",
            "must have equally many features, got 64 for samples.npz and 256 for large.npz",
        ),
        (
            "--features {f} --reference adm.npz",
            "adm.npz has no images, only statistics of 2048 features of the ADM suite's Inception",
        ),
        ("--inception nowhere.pth", "there is no nowhere.pth, expected weights-inception-2015-12"),
        ("--features pixels --reference nothing", "nothing holds no images: expected .png"),
        ("--features pixels --write_reference ref.npz", "write_reference ref.npz exists already"),
        ("--features pixels --write_reference new.np", "write_reference must end in .npz"),
        ("--features pixels --write_reference no/x.npz", "must be a file in a folder that exists"),
        ("--features pixels --samples nothing", "nothing holds no images: expected .png"),
        (
            "--features digit_pixels:lost",
            "features digit_pixels:lost failed on uint8 [1, 1, 8, 8]: KeyError: 'weights'",
        ),
        (
            "--features digit_pixels:later",
            "features digit_pixels:later failed on uint8 [64, 1, 8, 8]: KeyError: 'weights'",
        ),
        ("--features broken_code:f", "features broken_code:f cannot be imported: invalid syntax"),
    ],
)
def test_bad_input_is_one_line(folder, args, message):
    args = args.format(f="digit_pixels:pixels").split()
    files = ("--samples", "samples.npz", "--reference", "ref.npz")
    done = call("evaluate", *files, *args, cwd=folder)
    assert not list(folder.glob("*.json"))
    line = error_of(done)
    assert line.startswith("error: ")
    assert message in line


def write_pngs(folder, images: np.ndarray) -> None:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(folder / f"{i:04d}.png")


def test_folders_of_images_give_the_scores_of_arrays(folder):
    for name in ("samples", "ref"):
        with np.load(folder / f"{name}.npz") as held:
            write_pngs(folder / name, held["arr_0"])
    reports = {}
    for suffix in ("", ".npz"):
        files = ("--samples", f"samples{suffix}", "--reference", f"ref{suffix}")
        out = f"scores{suffix}.json"
        done = call("evaluate", *files, "--features", "pixels", "--out", out, cwd=folder)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.startswith("extractor: pixels (64 features)\n")
        reports[suffix] = json.loads((folder / out).read_text())
    folders = reports[""]
    arrays = reports[".npz"]
    assert folders["extractor"] == {"name": "pixels", "dimensions": 64}
    assert folders["samples"] == {"path": "samples", "images": 360, "shape": [8, 8, 1]}
    assert folders["comparable"]["fid"].startswith("not comparable: other extractor")
    for name in ("fid", "precision", "recall"):
        assert folders[name] == arrays[name]

    # the Fréchet distance of the pixels themselves
    with np.load(folder / "samples.npz") as samples, np.load(folder / "ref.npz") as ref:
        gaussians = [
            fit_gaussian(held["arr_0"].reshape(-1, 64) / 127.5 - 1) for held in (samples, ref)
        ]
    assert folders["fid"] == pytest.approx(frechet_distance(*gaussians), rel=1e-4)
    # the cache of a folder lies beside it
    kept = sorted(path.name for path in folder.glob("*.stats.npz"))
    assert [name[:10] for name in kept] == ["ref.npz.pi", "ref.pixels"]


def test_a_reference_is_written_and_belongs_to_its_extractor(folder):
    args = ("--reference", "ref.npz", "--write_reference", "mine.npz")
    done = call("evaluate", *args, "--features", "pixels", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "written: mine.npz, the statistics of 1437 images" in done.stdout
    assert not (folder / "scores.json").exists(), "nothing was scored"
    with np.load(folder / "mine.npz") as held:
        assert {*held} == {"mu", "sigma", "extractor", "count", "shape"}
        assert (str(held["extractor"]), int(held["count"])) == ("pixels", 1437)

    fids = []
    for reference in ("ref.npz", "mine.npz"):
        files = ("--samples", "samples.npz", "--reference", reference)
        done = call("evaluate", *files, "--features", "pixels", cwd=folder)
        assert done.returncode == 0, done.stderr[-2000:]
        report = json.loads((folder / "scores.json").read_text())
        fids.append(report["fid"])
    assert fids[1] == fids[0]
    assert report["reference"]["images"] == 1437
    assert report["reference"]["statistics"] == "of the file"
    assert report["reference"]["shape"] == [8, 8, 1]
    assert "differ in size" not in report["comparable"]["fid"]
    assert "was not written by the ADM suite" in report["comparable"]["fid"]
    assert report["precision"] is None

    for extractor in ("digit_pixels:pixels", "digit_pixels:eight"):
        done = call("evaluate", *files, "--features", extractor, "--out", "no.json", cwd=folder)
        assert done.returncode == 2
        assert "mine.npz has statistics of the extractor pixels, expected those of" in done.stderr
        assert not (folder / "no.json").exists()
    again = ("--reference", "mine.npz", "--write_reference", "copy.npz", "--samples", "samples.npz")
    done = call("evaluate", *again, "--features", "pixels", cwd=folder)
    assert "needs images, but mine.npz brings statistics already" in error_of(done)


def test_a_written_reference_knows_the_size_of_its_images(folder):
    """Each of the two sizes gives 64 features of pixels."""
    for size, images in ((8, "ref.npz"), (16, "large.npz")):
        # the second time from the cache
        for name in ("first", "cached"):
            args = ("--reference", images, "--write_reference", f"{name}{size}.npz")
            done = call("evaluate", *args, "--features", "pixels", cwd=folder)
            assert done.returncode == 0, done.stderr[-2000:]
    for size, name, differs in (
        (8, "first", True),
        (8, "cached", True),
        (16, "first", False),
        (16, "cached", False),
    ):
        files = ("--samples", "large.npz", "--reference", f"{name}{size}.npz")
        done = call("evaluate", *files, "--features", "pixels", cwd=folder)
        assert done.returncode == 0, done.stderr[-2000:]
        report = json.loads((folder / "scores.json").read_text())
        assert report["reference"]["shape"] == [size, size, 1]
        reason = "samples and reference images differ in size"
        assert (reason in report["comparable"]["fid"]) == differs


def test_too_few_images_are_a_warning(folder):
    few = to_uint8(Digits().images[:64])
    np.savez(folder / "few.npz", arr_0=few, arr_1=np.arange(64))
    files = ("--samples", "few.npz", "--reference", "ref.npz")
    done = call("evaluate", *files, "--features", "pixels", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    (warning,) = json.loads((folder / "scores.json").read_text())["warnings"]
    assert warning.startswith("few.npz: 64 images for 64 features, so that the covariance is sing")


def test_samples_or_a_reference_to_write(folder):
    done = call("evaluate", "--reference", "ref.npz", "--features", "pixels", cwd=folder)
    assert done.returncode == 2
    assert "expected samples to score, or write_reference" in error_of(done)


@pytest.mark.parametrize(
    "args, message",
    [
        ("--out samples.npz", "out samples.npz would replace samples samples.npz"),
        ("--out ./nothing/../ref.npz", "out nothing/../ref.npz would replace reference ref.npz"),
        ("--out link.npz", "out link.npz would replace reference ref.npz"),
        (
            "--features digit_pixels:pixels --out digit_pixels.py",
            "out digit_pixels.py would replace features digit_pixels.py",
        ),
        (
            "--samples made --out made/samples.json",
            "out made/samples.json would replace a file of samples made",
        ),
        (
            "--samples made/samples.npz --out made/prompts.jsonl",
            "out made/prompts.jsonl would replace the samples' prompts.jsonl made/prompts.jsonl",
        ),
        (
            "--write_reference same.npz --out same.npz",
            "every output must have its own name, got out same.npz, write_reference same.npz",
        ),
    ],
)
def test_no_output_replaces_an_input(folder, args, message):
    (folder / "link.npz").symlink_to(folder / "ref.npz")
    (folder / "made").mkdir()
    (folder / "made/samples.npz").write_bytes((folder / "samples.npz").read_bytes())
    (folder / "made/samples.json").write_text("{}")
    (folder / "made/prompts.jsonl").write_text('"a"\n')
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    files = ("--samples", "samples.npz", "--reference", "ref.npz", "--features", "pixels")
    done = call("evaluate", *files, *args.split(), cwd=folder)
    assert done.returncode == 2
    assert message in error_of(done)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_scores_may_lie_beside_their_samples(folder):
    """And are replaced by those of the next call."""
    (folder / "made").mkdir()
    (folder / "samples.npz").rename(folder / "made/samples.npz")
    args = "--samples made --reference ref.npz --features pixels --out made/scores.json".split()
    for _ in range(2):
        done = call("evaluate", *args, cwd=folder)
        assert done.returncode == 0, done.stderr[-2000:]
