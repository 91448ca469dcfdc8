"""Every format there and back, from every source; the model folder, its card and its upload."""

import argparse
import json
import logging
import resource
import signal

import pytest
import torch
import yaml
from foreign import network, run_folder, same, weights
from launch import call, call_console, error_of
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tiny_config import config

import sra_fast
from sra_fast.checkpoint.formats import Options, export, format_of
from sra_fast.checkpoint.load_model import load_model
from sra_fast.checkpoint.sources import read_weights
from sra_fast.config.schema import DiffusionConfig
from sra_fast.data.facts import DataFacts
from sra_fast.models import DiT, arguments_of
from sra_fast.training.initial import read_initial

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
FACTS = DataFacts("digits", (1, 8, 8), 10, class_names=NAMES, pixels=True, path="/home/me/digits")


def published(folder, model, **sizes):
    """A checkpoint of the published code, its optimizer after a step."""
    table = torch.nn.Parameter(model.pos_embed, requires_grad=False)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    student = weights(model)
    optimizer = torch.optim.AdamW([table, *model.parameters()])
    optimizer.step()
    model.load_state_dict(student)
    held = {
        "model": weights(network(seed=3, **sizes)),
        "ema": student,
        "opt": optimizer.state_dict(),
        "args": argparse.Namespace(
            num_heads=2, model="SiT-S/2", path_type="cosine", time_shift=2.5
        ),
        "epoch": 0,
        "steps": 1,
    }
    torch.save(held, folder / "source.pt")
    return folder / "source.pt"


def plain(folder, model, without=()):
    save_file(weights(model, without), folder / "plain.safetensors")
    return folder / "plain.safetensors"


SOURCES = {
    "run": lambda folder, model: run_folder(folder / "run", model, 7, FACTS.as_json()),
    "published": published,
    "plain": plain,
    "without a head": lambda folder, model: plain(folder, model, ["ap_head."]),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("out", ["new/w.safetensors", "new/digits.v1"])
def test_there_and_back_is_the_same(tmp_path, source, out):
    """The same bits, and everything that is known about them."""
    model = network()
    path = SOURCES[source](tmp_path, model)
    export(Options(str(path), str(tmp_path / out), num_heads=2))
    before = load_model(str(path), num_heads=2)
    after = load_model(str(tmp_path / out))
    assert same(after.model.state_dict(), before.model.state_dict())
    assert arguments_of(after.model) == arguments_of(model)
    for name in ("diffusion", "facts", "step", "fresh"):
        assert getattr(after, name) == getattr(before, name), name
    if source == "published":
        assert after.diffusion == DiffusionConfig(path="cosine", time_shift=2.5)
    if source == "run":
        assert (after.facts, after.step) == (FACTS, 7)
    # and a run starts from it
    args = ("--train.init_from", str(tmp_path / out), "--diffusion.path", before.path)
    initial = read_initial(config(*args))
    assert same(initial["ema"], weights(model, before.fresh))
    # a second export is the first one
    again = tmp_path / "again.safetensors"
    export(Options(str(tmp_path / out), str(again)))
    assert same(load_model(str(again)).model.state_dict(), before.model.state_dict())


def test_sizes_that_a_configuration_cannot_hold(tmp_path):
    """mlp_ratio and learn_sigma are no fields of it."""
    model = network(DiT, mlp_ratio=2, learn_sigma=False, class_dropout_prob=0.0)
    args = argparse.Namespace(num_heads=2, model="DiT-S/2", num_classes=10)
    torch.save({"ema": weights(model), "args": args}, tmp_path / "w.pt")
    export(Options(str(tmp_path / "w.pt"), str(tmp_path / "folder")))
    found = load_model(str(tmp_path / "folder")).model
    assert type(found) is DiT and arguments_of(found) == arguments_of(model)
    assert same(found.state_dict(), weights(model))


@pytest.mark.parametrize(
    "facts, said",
    [
        (FACTS, None),
        (DataFacts("latents", (1, 8, 8), 10, scale=0.18215), None),
        (
            DataFacts("latents", (1, 8, 8), 10, scale=1.53, shift=0.06),
            "the model's have 1.53 and 0.06",
        ),
    ],
)
def test_latents_that_the_published_code_decodes_as_others_are_said(tmp_path, caplog, facts, said):
    run = run_folder(tmp_path / "run", network(), 7, facts.as_json())
    export(Options(str(run), str(tmp_path / "w.pt")))
    assert ("decodes latents with the scale 0.18215 and no shift" in caplog.text) == bool(said)
    assert said is None or said in caplog.text
    # it is read with its own
    assert load_model(str(tmp_path / "w.pt")).facts == facts


def test_published_there_and_back_is_the_same(tmp_path):
    source = published(tmp_path, network())
    export(Options(str(source), str(tmp_path / "new/out.pt")))
    before = read_weights(str(source))
    after = read_weights(str(tmp_path / "new/out.pt"))
    assert before.keys() == after.keys()
    assert same(after["ema"], before["ema"]) and same(after["model"], before["model"])
    assert (after["args"], after["steps"], after["epoch"]) == (before["args"], 1, 0)
    assert after["opt"]["param_groups"] == before["opt"]["param_groups"]
    for number, state in before["opt"]["state"].items():
        assert same(after["opt"]["state"][number], state)


def test_published_weights_that_do_not_say_their_heads(tmp_path):
    held = torch.load(published(tmp_path, network()), weights_only=False)
    del held["args"].num_heads
    torch.save(held, tmp_path / "w.pt")
    args = ("--checkpoint", tmp_path / "w.pt", "--out", tmp_path / "out.pt")
    assert "num_heads cannot be read" in error_of(call("export", *args))
    done = call("export", *args, "--num_heads", 2)
    assert done.returncode == 0, done.stderr
    assert same(read_weights(str(tmp_path / "out.pt"))["ema"], held["ema"])


def test_a_published_file_needs_the_optimizer(tmp_path):
    model = network()
    held = torch.load(published(tmp_path, model), weights_only=False)
    torch.save({**held, "opt": {"state": {}}}, tmp_path / "empty.pt")
    for source, message in (
        (plain(tmp_path, model), "has no model and no opt: expected --out FILE.safetensors"),
        (tmp_path / "empty.pt", "has no state"),
    ):
        with pytest.raises(ValueError, match=message):
            export(Options(str(source), str(tmp_path / "out.pt"), num_heads=2))
    assert not (tmp_path / "out.pt").exists()


def test_a_run_becomes_a_published_file(tmp_path):
    """Student, EMA and moments of a checkpoint, though there is an export beside it."""
    ema = network()
    student = network(seed=1)
    run = run_folder(tmp_path / "run", ema, 7, FACTS.as_json(), student)
    assert export(Options(str(run), str(run / "ema.safetensors"))).is_dir()
    source = export(Options(str(run), str(tmp_path / "out.pt")))
    assert source == run / "checkpoints/step_00000007"
    held = read_weights(str(tmp_path / "out.pt"))
    assert same(held["ema"], weights(ema))
    assert same(held["model"], weights(student))
    assert (held["steps"], held["args"].num_heads, held["data"]) == (7, 2, FACTS.as_json())
    parameters = [torch.nn.Parameter(ema.pos_embed, requires_grad=False), *ema.parameters()]
    optimizer = torch.optim.AdamW(parameters)
    optimizer.load_state_dict(held["opt"])
    for p in ema.parameters():
        state = optimizer.state[p]
        assert torch.equal(state["exp_avg"], p.data)
        assert torch.equal(state["exp_avg_sq"], 2 * p.data)
        assert state["step"] == 7


def test_the_student_of_a_run_samples(tmp_path):
    student = network(seed=1)
    run = run_folder(tmp_path / "run", network(), 7, None, student)
    loaded = load_model(str(run), "model")
    assert same(loaded.model.state_dict(), weights(student)) and loaded.weights == "model"
    export(Options(str(run), str(run / "ema.safetensors")))
    assert same(load_model(str(run), "model").model.state_dict(), weights(student))


# the model folder


def scored_run(tmp_path, step=7, weights="ema"):
    run = run_folder(tmp_path / "run", network(), 7, FACTS.as_json())
    summary = {
        "run_dir": "/home/me",
        "step": step,
        "weights": weights,
        "images_per_s": 5.0,
        "label_accuracy": 0.975,
        "loss_last": 0.5,
    }
    (run / "summary.json").write_text(json.dumps(summary))
    scores = {
        "step": step,
        "weights": weights,
        "fid": 12.25,
        "precision": None,
        "comparable": {"fid": "with nothing"},
    }
    (run / "scores.json").write_text(json.dumps(scores))
    return run


def test_the_model_folder(tmp_path):
    run = scored_run(tmp_path)
    out = tmp_path / "digits"
    done = call("export", "--checkpoint", run, "--out", out)
    assert done.returncode == 0 and done.stdout.strip() == str(out), done.stderr
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    held = json.loads((out / "config.json").read_text())
    assert held["library_name"] == "sra-fast" and held["library_version"] == sra_fast.__version__
    assert held["architectures"] == ["SiT"] and held["step"] == 7
    assert held["arguments"] == arguments_of(network())
    assert held["config"]["optim"]["lr"] == 1e-4
    assert DataFacts.from_json(held["data"]) == FACTS

    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "sra-fast"
    assert "# digits\n" in text and "after 7 optimizer steps" in text
    assert "sra-fast sample --checkpoint digits --count 100 --out samples\n" in text
    for row in (
        "| num_heads | 2 |",
        "| class names | zero, one, two",
        "| label_accuracy | 0.975 |",
        "| loss_last | 0.5 |",
        "| fid | 12.25 (with nothing) |",
    ):
        assert row in text
    assert "lr: 0.0001" in text
    # nothing about the machine that trained
    assert "/home/me" not in text and "images_per_s" not in text


@pytest.mark.parametrize("made_of", [dict(step=9), dict(weights="model"), dict(step=None)])
def test_scores_of_other_weights_are_not_shown(tmp_path, made_of):
    """Those of the end of a run, for an earlier checkpoint or for the student."""
    export(Options(str(scored_run(tmp_path, **made_of)), str(tmp_path / "folder")))
    text = (tmp_path / "folder/README.md").read_text()
    assert "after 7 optimizer steps" in text
    for name in ("Scores", "label_accuracy", "fid"):
        assert name not in text


def test_the_card_says_which_weights_these_are(tmp_path):
    """Weights of any origin can be written."""
    model = network()
    args = argparse.Namespace(num_heads=2)
    run = run_folder(tmp_path / "run", model)
    torch.save({"model": weights(model), "args": args, "steps": 3}, tmp_path / "student.pt")
    torch.save({"ema": weights(model), "args": args}, tmp_path / "ema.pt")
    torch.save({"state_dict": weights(model), "args": args}, tmp_path / "any.pt")
    for source, sentence in (
        (run, "trained with [sra-fast]: the EMA of the weights after 7 optimizer steps, in"),
        ("student.pt", "as [sra-fast] reads it: the student's weights after 3 optimizer steps, in"),
        ("ema.pt", "as [sra-fast] reads it: the EMA of the weights, in"),
        ("any.pt", "as [sra-fast] reads it: the weights, in"),
    ):
        # again from the folder that was written: what is not known is not made up
        export(Options(str(tmp_path / source), str(tmp_path / "folder")))
        assert sentence in (tmp_path / "folder/README.md").read_text()
    export(Options(str(tmp_path / "student.pt"), str(tmp_path / "folder")))
    export(Options(str(tmp_path / "folder"), str(tmp_path / "again")))
    text = (tmp_path / "again/README.md").read_text()
    assert "the student's weights after 3 optimizer steps" in text and "EMA" not in text


def test_other_tools_may_drop_the_metadata(tmp_path):
    """config.json has it too."""
    model = network()
    run = run_folder(tmp_path / "run", model, 7, FACTS.as_json())
    export(Options(str(run), str(tmp_path / "folder")))
    expected = load_model(str(tmp_path / "folder"))
    file = tmp_path / "folder/model.safetensors"
    save_file(weights(model), file)
    with safe_open(file, "pt") as held:
        assert not held.metadata()
    found = load_model(str(tmp_path / "folder"))
    for name in ("path", "facts", "step", "config"):
        assert getattr(found, name) == getattr(expected, name)


@pytest.fixture
def hub(monkeypatch):
    """A hub that writes down what it is asked for, and fails if it is told to."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    calls = []

    class FakeApi:
        error = None

        def create_repo(self, repo_id, **options):
            if FakeApi.error is not None:
                raise FakeApi.error
            calls.append(("create", repo_id, options))

        def upload_folder(self, **options):
            calls.append(("upload", options))

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    return FakeApi, calls


def test_push(tmp_path, hub):
    _, calls = hub
    out = tmp_path / "folder"
    run = scored_run(tmp_path)
    done = call("export", "--checkpoint", run, "--out", out, "--push", "me/digits")
    assert done.returncode == 0, done.stderr
    create, upload = calls
    assert create == ("create", "me/digits", {"repo_type": "model", "exist_ok": True})
    assert upload[1].pop("ignore_patterns") == [".*", "*/.*"]
    assert upload == (
        "upload",
        {"folder_path": str(out), "repo_id": "me/digits", "repo_type": "model"},
    )
    card = (out / "README.md").read_text()
    assert "# me/digits\n" in card and "hf download me/digits --local-dir digits" in card


def test_push_without_a_network_is_one_line(tmp_path, hub, monkeypatch):
    api, _ = hub
    api.error = ConnectionError("no route to host\nmore")
    run = run_folder(tmp_path / "run", network())
    out = tmp_path / "folder"
    done = call("export", "--checkpoint", run, "--out", out, "--push", "me/digits")
    assert done.returncode == 2
    line = error_of(done)
    assert f"{out} is written, and could not be uploaded to me/digits: no route to host" in line
    assert "hf auth login" in line and (out / "config.json").exists()
    monkeypatch.setattr(
        "sra_fast.utils.files.find_spec", lambda name: name == "safetensors" or None
    )
    done = call("export", "--checkpoint", run, "--out", tmp_path / "b", "--push", "me/digits")
    assert "needs huggingface_hub: pip install 'sra-fast[hub]'" in error_of(done)
    done = call("export", "--checkpoint", run, "--out", tmp_path / "b", "--format", "diffusers")
    assert "has classes for DiT and MMDiT, the weights are of a SiT" in error_of(done)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "out, options, expected",
    [
        ("a.safetensors", {}, "safetensors"),
        ("a.pt", {}, "published"),
        ("a", {}, "huggingface"),
        ("models/v1.0", {}, "huggingface"),
        ("digits.v1", {}, "huggingface"),
        ("dit-1.5b", {}, "huggingface"),
        ("y.foo", {"format": "huggingface"}, "huggingface"),
        ("a", {"format": "diffusers", "vae": "v", "fold_time": True}, "diffusers"),
        ("a", {"push": "me/a"}, "huggingface"),
    ],
)
def test_the_name_says_the_format(out, options, expected):
    assert format_of(Options("source", out, **options)) == expected


@pytest.mark.parametrize(
    "out, options, message",
    [
        (
            "a.npz",
            {},
            r"expected out to end with .safetensors or .pt, or a folder \(.*\), got a.npz",
        ),
        ("a.bin", {}, "expected out to end with"),
        ("y.foo", {}, "expected out to end with .* got y.foo"),
        ("w.safetensor", {}, "expected out to end with .* got w.safetensor"),
        ("w.SAFETENSORS", {}, "expected out to end with"),
        ("a.pt", {"format": "safetensors"}, "a file that ends with .safetensors, got out a.pt"),
        ("a", {"format": "published"}, "a file that ends with .pt, got out a"),
        ("a.pt", {"format": "huggingface"}, "writes a folder, got out a.pt"),
        ("a", {"format": "onnx"}, "expected a format of safetensors, published, .*, got onnx"),
        ("a", {"vae": "v"}, "vae goes with format diffusers, got format huggingface"),
        ("a", {"fold_time": True}, "fold_time goes with format diffusers"),
        ("a.pt", {"push": "me/a"}, "push uploads a folder"),
        ("a", {"push": "a"}, "push expects USER/NAME, got a"),
        ("a", {"push": "a/b/c"}, "push expects USER/NAME, got a/b/c"),
    ],
)
def test_options_that_do_not_go_together(out, options, message):
    with pytest.raises(ValueError, match=message):
        export(Options("nowhere", out, **options))


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    """A run folder would be uploaded as a whole."""
    run = run_folder(tmp_path / "run", network())
    for format in ("huggingface", "diffusers"):
        with pytest.raises(
            ValueError, match="holds other files: .* found checkpoints, config.yaml"
        ):
            export(Options(str(run), str(run), format))
    # the same folder again is no other file
    for _ in range(2):
        export(Options(str(run), str(tmp_path / "folder")))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    run = run_folder(tmp_path / "run", network())
    done = call_console("export", "--checkpoint", run, "--out", tmp_path / "file")
    assert done.returncode == 2
    assert f"out {tmp_path / 'file'} cannot be" in error_of(done)


@pytest.fixture
def small_disk(monkeypatch):
    """A file that is larger than 5000 bytes is cut off there, and writing it fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    "out, reason",
    [
        ("new/w.safetensors", "File too large"),
        ("new/folder", "File too large"),
        # torch.save does not tell the reason
        ("new/w.pt", "No space left on device"),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, out, reason, small_disk):
    torch.set_num_threads(1)
    source = tmp_path / "source"
    source.mkdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    path = published(source, network())
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    done = call("export", "--checkpoint", path, "--out", tmp_path / out)
    assert done.returncode == 2
    assert done.stderr == f"error: out {tmp_path / out} cannot be written: {reason}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_import_on_a_full_disk_is_one_line(tmp_path, monkeypatch):
    """In safetensors' own words."""

    def full(*_, **__):
        text = "Error while serializing: I/O error: No space left on device (os error 28)"
        raise SafetensorError(text)

    source = plain(tmp_path, network(DiT), ["ap_head."])
    monkeypatch.setattr("sra_fast.utils.outputs.save_file", full)
    out = tmp_path / "new/w.safetensors"
    args = ("--from", source, "--out", out, "--model", "DiT-S/2", "--num_heads", 2)
    done = call("import_weights", *args)
    assert done.returncode == 2
    line = f"{out} cannot be read or written: No space left on device"
    assert done.stderr == f"error: {line}\n"
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_a_full_disk_leaves_the_folder_of_before(tmp_path, monkeypatch):
    run = run_folder(tmp_path / "run", network())
    out = tmp_path / "folder"
    export(Options(str(run), str(out)))
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sra_fast.checkpoint.huggingface.write_json", full)
    other = run_folder(tmp_path / "other", network(seed=1))
    message = f"out {out} cannot be written: No space left on device"
    with pytest.raises(ValueError, match=message):
        export(Options(str(other), str(out)))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_export_does_not_replace_what_it_reads(tmp_path):
    path = published(tmp_path, network())
    file = tmp_path / "w.safetensors"
    export(Options(str(path), str(file)))
    export(Options(str(path), str(tmp_path / "folder")))
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights(network()), file.name)}))
    link = tmp_path / "link.safetensors"
    link.symlink_to(file)
    run = run_folder(tmp_path / "run", network())
    (step,) = (run / "checkpoints").glob("step_*")
    piece = sorted(step.glob("*.safetensors"))[0]
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    cases = [
        (file, file),
        (link, file),
        (file, link),
        (path, path),
        (index, file),
        (tmp_path / "folder", tmp_path / "folder"),
        (tmp_path / "folder", tmp_path / "folder/model.safetensors"),
        (run, piece),
    ]
    for source, out in cases:
        with pytest.raises(ValueError, match=r"out .* would replace (a file of )?checkpoint"):
            export(Options(str(source), str(out), num_heads=2))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    done = call("import_weights", "--from", file, "--out", file, "--model", "SiT-S/2")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: --out {file} would replace --from {file}: expected another name\n"
    )


def test_a_card_that_was_edited_is_kept(tmp_path, caplog):
    """One of an export is replaced: it would tell of other weights."""
    run = run_folder(tmp_path / "run", network(), 7)
    later = run_folder(tmp_path / "later", network(seed=1), 9)
    out = tmp_path / "folder"
    export(Options(str(run), str(out)))
    export(Options(str(later), str(out)))
    assert "after 9 optimizer steps" in (out / "README.md").read_text()
    assert not caplog.text
    (out / "README.md").write_text("mine")
    # twice: the first call must not take it for its own afterwards
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            export(Options(str(run), str(out)))
        assert (out / "README.md").read_text() == "mine"
        assert f"{out}/README.md is kept as it is" in caplog.text
        assert load_model(str(out)).step == 7
    (out / "README.md").unlink()
    export(Options(str(run), str(out)))
    assert "after 7 optimizer steps" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    "name, args, line",
    [
        (
            "export",
            ("--checkpoint", "x", "--out", "y.foo"),
            "expected out to end with .safetensors or .pt, or a folder (of any name with format "
            "huggingface), got y.foo",
        ),
        (
            "export",
            ("--check", "x", "--out", "y"),
            "there is no option --check, did you mean --checkpoint?",
        ),
        ("export", ("--out", "y"), "the following arguments are required: --checkpoint"),
        (
            "export",
            ("--checkpoint", "x", "--out", "y", "--num_heads", "two"),
            "num_heads: expected a whole number, got two",
        ),
        ("import_weights", (), "the following arguments are required: --from, --out"),
        (
            "import_weights",
            ("--from", "x", "--out", "y.pt"),
            "--out must end with .safetensors, got y.pt",
        ),
        (
            "import_weights",
            ("--from", "x", "--out", "y.safetensors", "--mod", "SiT-S/2"),
            "there is no option --mod, did you mean --model?",
        ),
    ],
)
def test_a_mistake_is_one_line(name, args, line):
    """Without the usage, and an abbreviation is no option."""
    done = call(name, *args)
    assert done.returncode == 2
    assert done.stderr == f"error: {line}\n"


def test_both_ways_to_write_an_option():
    for option in ("--fold-time", "--fold_time"):
        done = call("export", "--checkpoint", "x", "--out", "y", option)
        assert "fold_time goes with format diffusers" in error_of(done)
