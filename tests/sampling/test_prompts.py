"""Samples of a model of text: prompts of a user, captions of a data set, and what is refused."""

import hashlib
import importlib
import json
import logging
import shutil
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from launch import call, error_of
from PIL import Image
from toy_data import write_images, write_text_encoder

from sra_fast.analysis import linear_probe
from sra_fast.analysis.alignment_rows import distance_rows, norm_rows
from sra_fast.analysis.features import data_of, noisy_features, split
from sra_fast.analysis.pca_maps import draw_maps
from sra_fast.analysis.run_scores import ScoreOptions, score_run
from sra_fast.checkpoint.load_model import load_model
from sra_fast.config.cli import make_parser, parse, parse_train
from sra_fast.config.schema import DataConfig, DiffusionConfig, SampleConfig
from sra_fast.data.dataset import make_dataset, open_data
from sra_fast.data.prompts import read_prompts
from sra_fast.data.text_encoders import load_text_encoders
from sra_fast.evaluation.held_out import HeldOutImages, HeldOutLoss, held_out_loss
from sra_fast.models import SiT
from sra_fast.plots import report
from sra_fast.sampling import parts as parts_of
from sra_fast.sampling import prompts as of_prompts
from sra_fast.sampling import run as script
from sra_fast.sampling.conditions import conditions_like, conditions_of, generate_for, spread
from sra_fast.sampling.generate import generate
from sra_fast.sampling.prompts import EncodedPrompts, choose_encoders
from sra_fast.training.monitor import Monitor
from sra_fast.training.plan import make_run_plan
from sra_fast.training.run import run as whole_run
from sra_fast.zero.process_group import init_distributed

pytestmark = [
    pytest.mark.usefixtures("rooms"),
    pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers"),
]
TRAIN = (
    "--model.name MMDiT-S/4 --model.hidden_size 32 --model.depth 2 --model.num_heads 2 "
    "--align none --data.num_workers 0 --train.global_batch 4 --train.steps 8 --train.ema_decay 0.5 "
    "--train.precision fp32 --train.log_every 1 --optim.lr 0.02 --sample.method euler "
    "--sample.steps 1 --monitor.every 8 --monitor.count 4 --monitor.held_out 3"
).split()


PROMPTS = ["a picture 0", "c picture 3", "words that nobody has said"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Twelve images of 8 px with two captions each, three of them held out; a run on them that has
    looked at its weights; its encoder, and another one.
    """
    for room in ("alignment", "data", "diffusion", "evaluation"):
        importlib.import_module(f"sra_fast.{room}")
    root = tmp_path_factory.mktemp("prompts")
    for name in write_images(root / "images"):
        file = (root / "images" / name).with_suffix(".txt")
        file.write_text(f"{name[0]} picture {name[2]}\nanother one")
    write_text_encoder(root / "clip")
    write_text_encoder(root / "other", seed=3)
    done = call(
        *("preprocess", "--source", root / "images", "--out", root / "data", "--pixels", "true"),
        *("--resolution", 8, "--holdout", 0.25, "--captions", "txt", "--threads", 1),
        *("--text_encoders", root / "clip"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    cfg = parse_train([*TRAIN, "--data", str(root / "data"), "--train.out", str(root / "runs")])[0]
    whole_run(make_run_plan(cfg), init_distributed())
    return root


@pytest.fixture
def one_process(monkeypatch):
    """No process group, whatever the run has set."""
    monkeypatch.setattr(script.os, "environ", {})


def options(made, out="out", **changed) -> script.Options:
    given = {
        "checkpoint": str(made / "runs/000"),
        "out": str(out),
        "prompts": PROMPTS,
        "sample": SampleConfig("euler", 2, guidance=3.0, interval=(0.3, 1.0)),
    }
    return script.Options(**{**given, **changed})


def images_of(job, *spans) -> np.ndarray:
    """Images of spans of numbers, uint8."""
    make = script.image_maker(job, progress=lambda finished: None)
    with torch.no_grad():
        return np.concatenate([make(*span) for span in spans])


def test_the_command_makes_an_image_of_each_prompt(made, tmp_path):
    """The same as a generation by hand; what is written says what was sampled."""
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff" + "\r\n".join(PROMPTS) + "\r\n\n")
    (tmp_path / "out").mkdir()
    done = call(
        *("sample", "--checkpoint", made / "runs/000", "--prompts", file, "--scale", 8),
        *("--out", tmp_path / "out", "--sample.method", "euler", "--sample.steps", 2),
        *("--cfg-scale", 3, "--sample.interval", "[0.3, 1.0]"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["count"] == 3
    encoders = load_text_encoders([str(made / "clip")])
    features, empty = (encoders.encode(encoders.tokenize(t)[0]) for t in (PROMPTS, [""]))
    cfg = options(made).sample
    model = load_model(str(made / "runs/000")).model
    given = replace(features, empty=empty)
    latents = generate(model, given, cfg, DiffusionConfig(), 0, 3, "cpu")
    expected = report.to_uint8(latents).astype(int)
    with np.load(tmp_path / "out/samples.npz") as held:
        assert np.abs(held["arr_0"] - expected).max() <= 1
        assert held["arr_1"].tolist() == [0, 1, 2]
    unguided = generate(model, given, replace(cfg, guidance=1.0), DiffusionConfig(), 0, 3, "cpu")
    assert np.abs(report.to_uint8(unguided).astype(int) - expected).max() > 3
    lines = (tmp_path / "out/prompts.jsonl").read_bytes()
    assert [json.loads(line) for line in lines.splitlines()] == PROMPTS
    origin = json.loads((tmp_path / "out/samples.json").read_text())
    assert origin["prompts_sha256"] == hashlib.sha256(lines).hexdigest()
    assert origin["text_encoders"] == encoders.identity == origin["data"]["text"]["encoders"]
    # a line below each image says what it is of
    with Image.open(tmp_path / "out/samples.png") as picture:
        assert picture.size[1] > 8 * 8 + 8 + 11


def test_an_image_depends_on_its_prompt_and_number_only(made, tmp_path, one_process):
    job = script.load_job(options(made, count=20, batch=3))
    assert job.conditions.numbers.tolist() == [i % 3 for i in range(20)]
    whole = images_of(job, (0, 20)).astype(int)
    assert np.array_equal(images_of(job, (0, 5), (5, 20)), whole)
    other = script.load_job(options(made, count=20, prompts=[PROMPTS[0], "unlike the others"]))
    assert np.abs(images_of(other, (0, 1)) - whole[:1]).max() <= 1
    assert np.abs(images_of(other, (1, 2)) - whole[1:2]).max() > 3
    # the same noise, other words
    assert len(np.unique(whole.reshape(20, -1), axis=0)) == 20


def test_prompts_are_encoded_when_they_are_needed_and_once(made, monkeypatch):
    encoders = load_text_encoders([str(made / "clip")])
    seen = []
    encode = encoders.encode
    monkeypatch.setattr(encoders, "encode", lambda ids: seen.append(ids) or encode(ids))
    many = [f"number {i}" for i in range(20)]
    conditions = EncodedPrompts(many, encoders, 50, dtype=torch.bfloat16)
    assert not seen
    found = conditions.read(18, 42)
    # all 20 of them, the last call filled up; and the empty prompt
    assert [len(ids) for ids in seen] == [16] * 3
    conditions.read(0, 2)
    assert len(seen) == 4
    chosen = [many[i % 20] for i in range(18, 42)]
    expected = encode(encoders.tokenize(chosen)[0])
    assert found.tokens.dtype == found.pooled.dtype == torch.bfloat16
    torch.testing.assert_close(found.tokens.float(), expected.tokens, rtol=0.01, atol=0.01)
    assert torch.equal(found.tokens[0], found.tokens[20])
    empty = encode(encoders.tokenize([""])[0])
    torch.testing.assert_close(found.empty.tokens.float(), empty.tokens, rtol=0.01, atol=0.01)


def test_stored_captions_are_those_of_the_images(made, one_process, tmp_path, caplog):
    """They make the images that their texts make as prompts, up to the rounding of stored fp16."""
    given = options(made, prompts=None, text=f"{made}/data/held_out:clip", count=4)
    caplog.clear()
    job = script.load_job(given)
    assert "held_out/text/clip has captions of 3 images, 4 were asked for: the" in caplog.text
    held_out = open_data(DataConfig(path=str(made / "data/held_out")))
    held_out.open_text()
    texts = [held_out.text.caption(i, 0) for i in range(3)]
    assert job.conditions.prompts == texts + texts[:1]
    assert job.conditions.numbers.tolist() == [0, 1, 2, 0]
    typed = script.load_job(options(made, prompts=texts, count=4))
    images = images_of(job, (0, 4))
    assert np.abs(images.astype(int) - images_of(typed, (0, 4))).max() <= 2
    assert job.conditions.facts["prompts_sha256"] == typed.conditions.facts["prompts_sha256"]
    # as many as there are images, but no more than a hundred
    caplog.clear()
    assert len(script.load_job(replace(given, count=None)).conditions) == 3
    assert len(script.load_job(replace(given, count=3)).conditions) == 3
    assert "take turns" not in caplog.text
    script.run(script.load_job(replace(given, out=str(tmp_path / "out"))))
    assert np.array_equal(np.load(tmp_path / "out/samples.npz")["arr_0"], images)


def test_unfinished_samples_of_other_prompts_are_refused(made, tmp_path, one_process, monkeypatch):
    monkeypatch.setattr(parts_of, "PART", 2)
    out = tmp_path / "out"
    monkeypatch.setattr(script, "join_parts", lambda *args: exit("killed"))
    with pytest.raises(SystemExit):
        script.run(script.load_job(options(made, out)))
    assert (out / "prompts.jsonl").exists() and not (out / "samples.npz").exists()
    assert len([*out.glob("parts/*.npy")]) == 2
    monkeypatch.setattr(script, "join_parts", parts_of.join_parts)
    with pytest.raises(ValueError, match="unfinished samples with prompts_sha256 "):
        script.run(script.load_job(options(made, out, prompts=PROMPTS[::-1])))
    stored = options(made, out, prompts=None, text=str(made / "data"), count=3)
    with pytest.raises(ValueError, match="unfinished samples with text None, this run has "):
        script.run(script.load_job(stored))
    # the same prompts from a file, with the encoder given
    (tmp_path / "x.json").write_text(json.dumps(PROMPTS))
    (out / "parts/000001.npy").unlink()
    asked = {"prompts": [str(tmp_path / "x.json")], "text_encoders": [str(made / "clip")]}
    script.run(script.load_job(options(made, out, **asked)))
    expected = images_of(script.load_job(options(made)), (0, 2), (2, 3))
    assert np.array_equal(np.load(out / "samples.npz")["arr_0"], expected)
    with pytest.raises(ValueError, match="samples.npz holds samples of .* with prompts_sha256 "):
        script.run(script.load_job(options(made, out, prompts=PROMPTS[::-1])))


def test_the_monitor_samples_captions_of_held_out_images(made):
    """Its picture is that of the run's weights, with the captions."""
    data = open_data(DataConfig(path=str(made / "data")))
    data.open_text()
    conditions = conditions_of(data, 4, "balanced", 0)
    held_out = data.held_out_split()[1][0]
    texts = [held_out.text.caption(i, 0) for i in range(3)]
    # evenly spread over the three, and in turn where more are asked for
    assert conditions.captions(4) == texts + texts[:1]
    told = conditions.read(0, 4)
    expected = held_out.text.read([0, 1, 2, 0])
    assert torch.equal(told.tokens, expected.tokens)
    assert torch.equal(told.empty.tokens, held_out.text.empty.tokens)
    # noise is another on another device
    device = init_distributed()
    model = load_model(str(made / "runs/000")).model.to(device)
    cfg = SampleConfig("euler", 1)
    with torch.no_grad():
        x = generate_for(model, conditions, range(4), cfg, DiffusionConfig(), 0, 64, device)
        # an image is the same in any batch
        for first in (0, 2):
            part = generate_for(
                model, conditions, range(first, first + 2), cfg, DiffusionConfig(), 0, 1, device
            )
            torch.testing.assert_close(part, x[first : first + 2], rtol=1e-4, atol=1e-4)
    report.save_grid(made / "expected.png", report.to_uint8(x), 10, 4, captions=texts + texts[:1])
    pictures = [
        np.asarray(Image.open(path)).astype(int)
        for path in (made / "expected.png", made / "runs/000/samples/step_00000008.png")
    ]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_altered_captions_stop_a_run_before_its_first_step(made, tmp_path):
    shutil.copytree(made / "data", tmp_path / "data")
    with (tmp_path / "data/held_out/text/clip/captions.jsonl").open("a") as file:
        file.write('"altered"')
    cfg = parse_train([*TRAIN, "--data", str(tmp_path / "data")])[0]
    data = make_dataset(cfg)
    with pytest.raises(ValueError, match="captions.jsonl was altered or cannot be read"):
        Monitor(cfg, torch.device("cpu"), tmp_path, data)


def test_conditions_are_spread_or_drawn(made):
    data = open_data(DataConfig(path=str(made / "data")))
    data.open_text()
    drawn = [conditions_of(data, 8, "random", seed).numbers.tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and set(drawn[0]) <= {0, 1, 2}
    assert spread(np.arange(5, 15), 4).tolist() == [5, 7, 10, 12]
    assert spread(np.arange(3), 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    # what samples are made for that are compared with some images has their labels
    conditions, labels = conditions_like(data, np.array([8, 1, 4]), 3)
    assert conditions.numbers.tolist() == [8, 1, 4]
    assert labels.tolist() == data.labels[[8, 1, 4]].tolist()
    data.text = None
    labels = conditions_of(data, 5, "balanced", 0)
    assert labels.read(1, 4).labels.tolist() == [1, 2, 0] and labels.captions(2) == ["a", "b"]
    more = conditions_of(data, 5, "balanced", 0, num_classes=4)
    assert more.numbers.tolist() == [0, 1, 2, 3, 0]


def test_analysis_sees_the_images_own_captions(made):
    """As conditions of norms, maps and distances; a probe sees the empty prompt."""
    loaded = load_model(str(made / "runs/000"))
    data = data_of(DataConfig(), loaded.facts)
    assert data.text == "clip"
    _, held_out = split(data, loaded.model, loaded.facts)
    images = held_out.read(3, 0, draws=2)
    rows = held_out.choose(3, 0).tolist()
    own = held_out.dataset.text.read(rows * 2)
    assert torch.equal(images.condition.tokens, own.tokens)
    assert images.labels.tolist() == held_out.dataset.labels[rows * 2].tolist()
    shared = (loaded.model, loaded.path, images)
    rows = norm_rows(*shared, [0.5], 4)
    of_others = images.condition.select(torch.tensor([1, 2, 0] * 2))
    others = norm_rows(*shared[:2], replace(images, condition=of_others), [0.5], 4)
    assert rows != others and [row["layer"] for row in rows] == [1, 2]
    maps = draw_maps(*shared, [0.5], [1, 2])
    assert maps.shape == (6, 1, 3, 8, 8, 3)
    _, distances = distance_rows(loaded, loaded, images, [0.5], 4)
    _, of_other = distance_rows(loaded, loaded, replace(images, condition=of_others), [0.5], 4)
    assert distances != of_other
    samples = linear_probe._samples(*shared, 0.5, [2], "mean", 4)
    null = replace(images, condition=images.condition.null())
    expected = noisy_features(*shared[:2], null, null.condition, 0.5, [2], lambda x: x.mean(1), 4)
    assert torch.equal(samples[0][1], expected[1][0])
    blind = loaded.model
    blind.class_dropout_prob = 0.0
    with pytest.raises(ValueError, match="a probe needs a model .* knows the empty prompt"):
        linear_probe.probe_layers(blind, loaded.path, (held_out, held_out), [0.5], [1])


def test_a_run_is_scored_by_its_captions(made, tmp_path, monkeypatch):
    """The held-out loss is of the first captions, and not paired with that of others."""
    found = score_run(
        made / "runs/000",
        ScoreOptions(held_out_images=3, samples=0, probe_images=0, distance_images=3, batch=4),
    )
    data = open_data(DataConfig(path=str(made / "data")))
    data.open_text()
    model = load_model(str(made / "runs/000")).model
    loss = held_out_loss(model, "linear", HeldOutImages(data, 3), batch=4)
    assert found["held_out"] == pytest.approx(loss.mean(), rel=1e-6)
    seen = HeldOutLoss.load(made / "runs/000/held_out/step_00000008.npz")
    assert (
        seen.key == loss.key
        and loss.settings["text"] == data.held_out_split()[1][0].text.fingerprint
    )
    other = HeldOutLoss(loss.losses, loss.times, loss.images, {**loss.settings, "text": "other"})
    with pytest.raises(ValueError, match="paired on the same .*, got text "):
        loss.paired(other)


def test_the_encoder_of_the_training_data_is_found_or_asked_for(made, monkeypatch):
    facts = load_model(str(made / "runs/000")).facts
    assert choose_encoders(None, facts).paths == [str(made / "clip")]
    gone = replace(facts, text={**facts.text, "paths": ["/gone/clip"]})
    with pytest.raises(ValueError, match=r"need --text_encoders, .* \(it was /gone/clip\)"):
        choose_encoders(None, gone)
    assert choose_encoders([str(made / "clip")], gone).paths == [str(made / "clip")]
    other = str(made / "other")
    with pytest.raises(ValueError, match=f"{other} .* another encoder than .*{made}/clip") as error:
        choose_encoders([other], facts)
    assert "\n" not in str(error.value)
    # features that say nothing of their encoder are compared by the empty prompt
    unknown = replace(facts, text={**facts.text, "encoders": None, "paths": None})
    assert choose_encoders([str(made / "clip")], unknown)
    with pytest.raises(ValueError, match="other are of another encoder .* prompt differs by"):
        choose_encoders([other], unknown)
    # zeros, as some data have them, are those of the same data
    zeros = open_data(DataConfig(path=str(made / "data")))
    zeros.open_text()
    zeros.text.empty.tokens.zero_()
    monkeypatch.setattr(of_prompts, "_stored", lambda path, name: zeros.text)
    of_prompts._check_empty("x", zeros.text.empty, unknown)
    with pytest.raises(ValueError, match="clip are of another encoder .*, its length is 0"):
        choose_encoders([str(made / "clip")], unknown)
    monkeypatch.undo()
    # it sees as many tokens as the features have
    fewer = replace(unknown, text={**unknown.text, "tokens": 12})
    with pytest.raises(ValueError, match=r"features \[20, 16\] .*clip are \[12, 16\]"):
        choose_encoders([str(made / "clip")], fewer)


def test_nothing_is_known_of_foreign_weights(made, caplog):
    with caplog.at_level(logging.WARNING, "sra_fast"):
        choose_encoders([str(made / "clip")], None)
    assert caplog.messages == [
        f"it is not known whether the text features of {made}/clip are of the encoder that the "
        "model was trained with"
    ]
    with pytest.raises(ValueError, match="need --text_encoders, the folder of the model's"):
        choose_encoders(None, None)


def test_prompts_that_are_too_long_are_counted(made, caplog):
    long = "much longer than twenty letters are"
    with caplog.at_level(logging.WARNING, "sra_fast"):
        script.load_job(options(made, prompts=["short", long, long]))
    (message,) = caplog.messages
    assert message.startswith("2 of 3 prompts are longer than the text encoder's 20 tokens")
    assert repr(long) in message


def test_arguments_are_prompts():
    def parsed(*args):
        args = ["--checkpoint", "x", *args]
        return parse(script.Options, make_parser(script.Options, ""), args)[0].prompts

    words = ["a cat", "3", "null", "a: b # c", "na\u00efve \U0001f600 \u2028", '"quoted"', "[a] b"]
    assert parsed("--prompts", *words, "--out", "x") == words
    assert parsed("--prompts=\U0001f600") == ["\U0001f600"]
    assert parsed("--prompts", '["a", b]') == ["a", "b"]
    assert parsed() is None


def test_files_of_prompts(tmp_path):
    def read(name, content):
        (tmp_path / name).write_text(content, encoding="utf-8")
        return read_prompts([str(tmp_path / name)])

    assert read("x.txt", "a cat \n na\u00efve\u2028x\n\n") == ["a cat", "na\u00efve\u2028x"]
    assert read("anything", "one\ntwo") == ["one", "two"]
    assert read("x.json", '["a\\nb", ""]') == ["a\nb", ""]
    assert read("x.jsonl", '"a"\n\n"b"\n') == ["a", "b"]
    assert read_prompts(["a cat", "a dog"]) == ["a cat", "a dog"]
    for name, content, message in [
        ("x.txt", "a\n\n \nb", "prompt in each line, 2 are blank, the first is line 2 "),
        ("x.txt", " \n", "x.txt holds no prompts"),
        ("x.json", "[]", "x.json holds no prompts"),
        ("x.json", '{"a": 1}', "must hold a list of strings, it holds something else"),
        ("x.json", "[1]", "must hold a list of strings"),
        ("x.jsonl", '"a"\n{}', "must hold a string in each line"),
        ("x.json", "[", "x.json is no JSON: "),
    ]:
        with pytest.raises(ValueError, match=message):
            read(name, content)
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "utf-16.json").write_text(json.dumps(["a\0"]))
    for given, message in [
        ([str(tmp_path / "x.txt")], "x.txt cannot be read: .*utf-8"),
        (
            ["gone.txt"],
            "must be the name of one file, or prompts, got gone.txt: there is no such file",
        ),
        ([str(tmp_path)], "a file or folder has this name"),
        ([""], "must not be empty"),
        (["a cat", "x.txt"], "got x.txt: there is no such file"),
        (["a cat", str(tmp_path / "x.txt")], "x.txt: a file or folder has this name"),
        (["a cat", " "], "must not be empty"),
        (["a \ud83d"], r"must be valid Unicode text, got 'a .ud83d'"),
        ([str(tmp_path / "utf-16.json")], r"must be valid Unicode text, got 'a.x00'"),
        ([], "at least one prompt, got none"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            read_prompts(given)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"classes": [1]}, "classes are for models of class labels, .* takes prompts"),
        ({"prompts": None}, "makes images from text: give --prompts .*, or --text"),
        ({"prompts": ["x.txt"]}, "got x.txt: there is no such file"),
        ({"text": "DATA"}, "text takes the captions of a data set, expected no prompts"),
        ({"prompts": None, "text": "nowhere:x"}, "FOLDER:NAME .*, there is no nowhere"),
        ({"prompts": None, "text": "DATA:x"}, "x: .* has none of this name, but clip"),
        ({"sample": SampleConfig(labels="random")}, "labels random is for models of class labels"),
        ({"text_encoders": ["nowhere"]}, "there is no config.json in nowhere"),
        ({"count": 0}, "count, batch, columns, grid and scale must be at least 1"),
    ],
)
def test_what_does_not_fit_a_model_of_text_is_one_line(changed, message, made):
    given = {
        name: value.replace("DATA", str(made / "data")) if name == "text" else value
        for name, value in changed.items()
    }
    with pytest.raises(ValueError, match=message) as error:
        script.load_job(options(made, **given))
    assert "\n" not in str(error.value)


def test_features_of_other_sizes_or_encoders_are_refused(made, tmp_path, monkeypatch, caplog):
    loaded = load_model(str(made / "runs/000"))
    loaded.model.context_tokens = 77
    monkeypatch.setattr(script, "load_model", lambda *args: loaded)
    for given in ({}, {"prompts": None, "text": str(made / "data")}):
        with pytest.raises(ValueError, match="takes text features with tokens 77, .* have 20"):
            script.load_job(options(made, **given))
    loaded.model.class_dropout_prob = 0.0
    with pytest.raises(ValueError, match=r"guidance 3.0 needs .* the empty prompt \(model.class"):
        script.load_job(options(made))
    encoders = [{**loaded.facts.text["encoders"][0], "sha256": "another"}]
    facts = replace(loaded.facts, text={**loaded.facts.text, "encoders": encoders})
    with pytest.raises(ValueError, match="data/text/clip .* another encoder than"):
        of_prompts.open_stored(str(made / "data"), facts)
    # with another set of text features, by other projects' encoders: the empty prompt tells
    unknown = replace(facts, text={**facts.text, "encoders": None})
    assert of_prompts.open_stored(f"{made}/data/held_out:clip", unknown).name == "clip"
    shutil.copytree(made / "data", tmp_path / "data")
    done = call(
        *(
            "preprocess",
            "--source",
            made / "images",
            "--out",
            tmp_path / "data",
            "--captions",
            "txt",
        ),
        *("--text_encoders", made / "other", "--threads", 1),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    other = f"{tmp_path}/data:other"
    with pytest.raises(ValueError, match="text/other are of another encoder .* prompt differs"):
        of_prompts.open_stored(other, unknown)
    with caplog.at_level(logging.WARNING, "sra_fast"):
        of_prompts.open_stored(other, replace(unknown, path="/gone"))
    assert "text/other are of the encoder that the model was trained with" in caplog.text
    with pytest.raises(ValueError, match="clip, other: text must name one .*data:clip for"):
        of_prompts.open_stored(str(tmp_path / "data"), None)


def test_a_model_of_labels_has_no_use_for_prompts(tmp_path):
    model = SiT(8, 2, 1, 32, 1, 2, num_classes=10)
    torch.save({"ema": model.state_dict()}, tmp_path / "model.pt")
    checkpoint = [
        "--checkpoint",
        tmp_path / "model.pt",
        "--num_heads",
        2,
        "--out",
        tmp_path / "out",
    ]
    for name in ("--prompts", "--text", "--text_encoders"):
        done = call("sample", *checkpoint, name, "a cat")
        assert done.returncode == 2
        name = name[2:].replace("-", "_")
        assert error_of(done).startswith(
            f"error: {name} is for models of text, this one takes class"
        )
    assert not (tmp_path / "out").exists()
