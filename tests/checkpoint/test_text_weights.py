"""Weights of an MMDiT: REPA's checkpoints, our own, and what train.init_from takes of others."""

import argparse
import copy
import functools
import logging
import re
from dataclasses import asdict, replace

import foreign
import pytest
import tiny_config
import torch
from foreign import flat, same, weights, write_checkpoint
from foreign_text import FACTS, SD3_PLACES, START, STEP, TEXT
from foreign_text import text_network as network
from golden import Golden, assert_matches

from sra_fast.checkpoint.export import write_export
from sra_fast.checkpoint.formats import Options, export
from sra_fast.checkpoint.huggingface import card
from sra_fast.checkpoint.load_model import LoadedModel, load_model
from sra_fast.checkpoint.official_weights import import_file
from sra_fast.checkpoint.sources import read_weights
from sra_fast.config.cli import parse_train, save_config
from sra_fast.config.schema import DiffusionConfig, ModelConfig
from sra_fast.models import TextFeatures, arguments_from_state_dict, arguments_of
from sra_fast.models.layers import sincos_pos_embed
from sra_fast.training.initial import read_initial
from sra_fast.utils.files import plain


@functools.cache
def _parsed():
    """A parser of all options takes long to make: one for all configurations."""
    layers = ("--align.student_layer", "1", "--align.teacher_layer", "1")
    return parse_train(["--model.name", "MMDiT-S/2", *layers])[0]


def config(model, init_from=None):
    """The configuration of a run with this model."""
    cfg = copy.deepcopy(_parsed())
    sizes = {**arguments_of(model), "context_tokens": 3}
    del sizes["mlp_ratio"]
    cfg.model = ModelConfig("MMDiT-S/2", **sizes)
    cfg.train.init_from = init_from and str(init_from)
    return cfg


@pytest.fixture(autouse=True)
def said(caplog):
    caplog.set_level(logging.WARNING)


# REPA


def repa_checkpoint(path, state):
    """As train_t2i.py saves it."""
    args = argparse.Namespace(path_type="linear", cfg_prob=0.1, resolution=256, exp_name="t2i")
    ema = {name: value * (1 if name == "pos_embed" else 0.5) for name, value in state.items()}
    torch.save({"model": state, "ema": ema, "opt": {}, "args": args, "steps": 9}, path)
    return ema


@torch.no_grad()
def test_a_checkpoint_of_repa_predicts_as_there(tmp_path, caplog):
    golden = Golden("mmdit_repa")
    path = str(tmp_path / "0000009.pt")
    state = golden.tree("sd")
    state = {name: value.float() for name, value in state.items() if not name.startswith("ap_head")}
    ema = repa_checkpoint(path, state)
    loaded = load_model(path, "model", num_heads=2)
    assert (loaded.model.family, loaded.path, loaded.step) == ("MMDiT", "linear", 9)
    text = TextFeatures(golden["context"], empty=TextFeatures(golden["empty"]))
    prediction = loaded.model(golden["xt"], golden["t"], text.dropped(golden["drop"]))
    assert_matches(prediction, golden["v_pred"])
    assert "not read from" in caplog.text and "projectors.0.0.weight" in caplog.text
    assert all(name.startswith("ap_head.") for name in loaded.fresh) and loaded.fresh
    # it is exported with the number of heads that the file does not say
    wanted = {name: value for name, value in ema.items() if not name.startswith("projectors.")}
    import_file(path, None, str(tmp_path / "imported.safetensors"), num_heads=2)
    for out in ("w.safetensors", "folder", "imported.safetensors"):
        if out != "imported.safetensors":
            export(Options(path, str(tmp_path / out), num_heads=2))
        again = load_model(str(tmp_path / out))
        assert same(weights(again.model, ["ap_head."]), wanted)
        assert arguments_of(again.model) == arguments_of(loaded.model)


def test_a_checkpoint_of_repa_starts_a_run(tmp_path):
    """All of it but the projection head."""
    model = network(pooled_size=0)
    state = weights(model, ["ap_head."])
    path = tmp_path / "0000009.pt"
    ema = repa_checkpoint(path, {**state, "projectors.0.0.weight": torch.zeros(8, 16)})
    del ema["projectors.0.0.weight"]
    initial = read_initial(config(model, path))
    assert same(initial["model"], state) and same(initial["ema"], ema)


def test_the_full_size_has_the_names_and_shapes_of_the_published_one():
    golden = Golden("mmdit_repa").arrays
    expected = {
        str(name): [int(size) for size in shape if size]
        for name, shape in zip(golden["full_names"], golden["full_shapes"], strict=True)
    }
    with torch.device("meta"):
        model = ModelConfig("MMDiT-REPA/2")
        model.fill_in()
        model.fill_in_text()
        state = model.build().state_dict()
    found = {name: [*value.shape] for name, value in state.items() if "ap_head." not in name}
    theirs = {name: shape for name, shape in expected.items() if "projectors." not in name}
    assert found == theirs and len(found) > 400
    # the published file alone says which model it is, its 24 heads by its size
    _, arguments = arguments_from_state_dict(state, input_size=32)
    assert (arguments["num_heads"], arguments["context_size"]) == (24, 768)


# our own


def run_folder(folder, model, student):
    cfg = config(model)
    folder.mkdir()
    save_config(cfg, folder / "config.yaml")
    kinds = {
        "master": flat(student),
        "exp_avg": flat(model),
        "exp_avg_sq": {name: value.square() for name, value in flat(model).items()},
        "ema.main": flat(model),
    }
    write_checkpoint(folder, kinds, 7, plain(asdict(cfg)), plain(FACTS.as_json()))
    return folder


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_run_there_and_back(tmp_path, qk_norm):
    """The same bits, and what shapes do not show, through every format."""
    model = network(qk_norm=qk_norm, context_tokens=3, class_dropout_prob=0.0, **SD3_PLACES)
    student = network(1, qk_norm=qk_norm, context_tokens=3, class_dropout_prob=0.0, **SD3_PLACES)
    run = run_folder(tmp_path / "run", model, student)
    for out in ("w.safetensors", "folder", "w.pt"):
        export(Options(str(run), str(tmp_path / out)))
        loaded = load_model(str(tmp_path / out))
        assert same(loaded.model.state_dict(), model.state_dict())
        assert arguments_of(loaded.model) == arguments_of(model)
        assert (loaded.facts, loaded.step) == (FACTS, 7)
        # and a run of the same configuration starts from it
        initial = read_initial(config(model, tmp_path / out), FACTS)
        assert same(initial["ema"], model.state_dict())
        if out == "w.pt":
            assert same(initial["model"], student.state_dict())
            assert initial["steps"] == 7 and len(initial["opt"]["state"]) == len(flat(model))
    assert load_model(str(run)).facts.text == TEXT


def test_the_card_says_what_the_captions_are():
    text = card(LoadedModel(network(), DiffusionConfig(), FACTS), "me/captions")
    assert "text-to-image" in text and "num_classes" not in text and "An MMDiT of" in text
    assert "| captions | clip: 3 tokens of 12 |" in text
    assert f"| text encoder | CLIPTextModel, sha256 {'a' * 64} |" in text
    assert "--prompts" in text and "/home/me" not in text


# train.init_from


def exported(file, model, facts=None):
    architecture = {"family": model.family, "arguments": arguments_of(model)}
    held = {"architecture": architecture, "diffusion": {"path": "linear"}}
    write_export(file, weights(model), held, None, facts)
    return file


OTHER = {**TEXT, "encoders": [{"class": "CLIPTextModel", "sha256": "b" * 64, "tokens": 3}]}
CONTEXT = ["context_embedder.bias", "context_embedder.weight"]
POOLED = [f"y_embedder.mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("bias", "weight")]


@pytest.mark.parametrize(
    "sizes, text, fresh, reason",
    [
        (dict(context_size=20), TEXT, ["context_embedder.weight"], "it is [16, 20]"),
        (dict(pooled_size=9), TEXT, ["y_embedder.mlp.0.weight"], "it is [16, 9]"),
        (dict(pooled_size=0), TEXT, POOLED, "it is absent"),
        (dict(input_size=16), TEXT, ["pos_embed"], "it is [1, 64, 16]"),
        ({}, OTHER, [*CONTEXT, *POOLED], "the features of another text encoder"),
        ({}, {**TEXT, "name": "other"}, [], ""),
    ],
)
def test_other_captions_are_fresh_and_said(tmp_path, caplog, sizes, text, fresh, reason):
    other = network(1, **sizes)
    file = exported(tmp_path / "w.safetensors", other, replace(FACTS, text=text))
    initial = read_initial(config(network(), file), FACTS)
    ours = network().state_dict()
    assert set(ours) - set(initial["ema"]) == set(fresh)
    assert all(
        torch.equal(initial["ema"][name], other.state_dict()[name]) for name in initial["ema"]
    )
    for name in fresh:
        assert f"{name} {[*ours[name].shape]} (" in caplog.text
    assert reason in caplog.text and bool(caplog.text) == bool(fresh)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (
            dict(time_scale=1000.0),
            "multiplies times by 1000, the model by 1: expected model.time_scale 1000",
        ),
        (
            dict(position_step=0.5, position_start=2.0),
            "expected model.position_start 2.0 and model.position_step 0.5",
        ),
        (dict(num_heads=4), "was made with 4 heads, the model has 2"),
        (dict(qk_norm=True), "attn.ln_k.weight should be absent"),
        (dict(depth=3), "should be"),
    ],
)
def test_other_networks_are_refused(tmp_path, sizes, message):
    file = exported(tmp_path / "w.safetensors", network(**sizes))
    with pytest.raises(ValueError, match=message) as error:
        read_initial(config(network(), file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("table", ["with", "without"])
@pytest.mark.parametrize("side, first", [(8, START + 2 * STEP), (24, START - 2 * STEP)])
def test_another_size_has_the_middle_of_the_table(tmp_path, table, side, first):
    """As SD3 has it: with other places, the predictions would be those of moved patches."""
    theirs = network(input_size=16, position_start=START, position_step=STEP)
    file = exported(tmp_path / "w.safetensors", theirs)
    if table == "without":
        held = read_weights(str(file))["config"]
        state = weights(theirs)
        del state["pos_embed"]
        write_export(file, state, held, None)
    cfg = config(network(input_size=side), file)
    cfg.model.position_start = cfg.model.position_step = None
    message = "expected model.position_start (.*) and model.position_step (.*)"
    with pytest.raises(ValueError, match=message) as error:
        read_initial(cfg)
    found = [float(value) for value in re.search(message, str(error.value)).groups()]
    assert found == pytest.approx([first, STEP], rel=1e-6)
    # what it asks for is taken, and so are places that somebody has chosen
    for places in (found, [0.0, 0.5]):
        cfg.model.position_start, cfg.model.position_step = places
        assert "x_embedder.proj.weight" in read_initial(cfg)["ema"]


def test_weights_that_may_be_sd3_are_converted_first(tmp_path):
    """Whatever the run multiplies its times by."""
    torch.save({"ema": network().state_dict()}, tmp_path / "w.pt")
    for time_scale in (1.0, 1000.0):
        with pytest.raises(ValueError, match="looks like SD3 .* import-weights --from"):
            read_initial(config(network(time_scale=time_scale), tmp_path / "w.pt"))


def test_labels_and_captions_are_two_networks(tmp_path):
    # the number of heads is another one too, and matters less
    labels = exported(tmp_path / "labels.safetensors", foreign.network(num_heads=4))
    captions = exported(tmp_path / "captions.safetensors", network())
    with pytest.raises(
        ValueError, match=r"holds a network of labels, the model \(MMDiT\) takes text"
    ):
        read_initial(config(network(), labels))
    with pytest.raises(
        ValueError, match=r"holds a network of text, the model \(SiT\) takes labels"
    ):
        read_initial(tiny_config.config("--train.init_from", str(captions)))


def test_a_table_of_other_positions_is_no_models(tmp_path):
    """A configuration and a table that contradict each other."""
    model = network()
    file = exported(tmp_path / "w.safetensors", model)
    state = {**weights(model), "pos_embed": sincos_pos_embed(4, 16, 1.0)}
    held = read_weights(str(file))["config"]
    write_export(file, state, held, None)
    with pytest.raises(ValueError, match="position table pos_embed is that of other positions"):
        load_model(str(file))
