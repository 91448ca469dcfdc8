"""Weights from anywhere give the same model, or one line that says what is wrong."""

import argparse
import json
import logging
import shutil
from dataclasses import asdict

import pytest
import torch
from foreign import SIZES, network, prefixed, run_folder, same, weights
from safetensors.torch import save_file
from tiny_config import config

from sra_fast.checkpoint import reading
from sra_fast.checkpoint.export import write_export
from sra_fast.checkpoint.load_model import load_model
from sra_fast.checkpoint.values import is_dense
from sra_fast.data.facts import DataFacts
from sra_fast.diffusion.samplers import sample
from sra_fast.models import DiT, SiT, arguments_of
from sra_fast.training.initial import read_initial
from sra_fast.utils.files import plain

FACTS = DataFacts("digits", (1, 8, 8), 10, class_names=list("abcdefghij"), scale=0.5, shift=0.1)


def assert_same_samples(model, expected):
    """Two steps of the sampler from the same noise, bit for bit."""
    z = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 5, 9])
    method = "ddim" if isinstance(expected, DiT) else "euler"
    ours, theirs = (sample(m, z, labels, method, 2) for m in (model, expected))
    assert torch.equal(ours, theirs)


def shards(folder, state, parts=3):
    """Sharded safetensors with an index, as Hugging Face's libraries write them."""
    folder.mkdir(exist_ok=True)
    names = list(state)
    places = {}
    for i in range(parts):
        file = f"model-{i + 1:05d}-of-{parts:05d}.safetensors"
        save_file({name: state[name] for name in names[i::parts]}, folder / file)
        places |= {name: file for name in names[i::parts]}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


@pytest.mark.parametrize("form", ["file", "index", "folder", "pt", "pth", "ckpt", "bin"])
def test_every_form_samples_alike(tmp_path, form):
    model = network()
    state = prefixed(weights(model), "_orig_mod.module.")
    path = tmp_path / f"w.{form}"
    if form == "file":
        path = tmp_path / "w.safetensors"
        save_file(state, path)
    elif form in ("index", "folder"):
        index = shards(tmp_path / "shards", state)
        path = index if form == "index" else index.parent
    else:
        torch.save({"state_dict": state}, path)
    loaded = load_model(str(path), num_heads=2)
    assert same(loaded.model.state_dict(), model.state_dict())
    assert_same_samples(loaded.model, model)
    assert (loaded.path, loaded.facts, loaded.config, loaded.step) == ("linear", None, None, None)


def test_a_run_folder_and_its_checkpoint(tmp_path):
    model = network()
    run = run_folder(tmp_path / "run", model, 7, FACTS.as_json())
    for path in (run, run / "checkpoints/step_00000007"):
        loaded = load_model(str(path))
        assert_same_samples(loaded.model, model)
        assert (loaded.facts, loaded.step) == (FACTS, 7)
        assert loaded.config["model"]["num_heads"] == 2


def test_the_newest_weights_of_a_run_are_taken(tmp_path):
    """A run that finished and was then continued has an export that is older than its
    checkpoints.
    """
    model = network()
    old = network(seed=1)
    run = run_folder(tmp_path, model, 7)
    config = load_model(str(run)).config
    ours = reading.digest_at(run, 7)
    # of another branch of the run, which a rollback has given up
    others = "0" * 64
    cases = [(6, None, model), (7, ours, old), (7, others, model), (24, others, model)]
    for step, digest, expected in [*cases, (7, None, model), (None, None, model)]:
        write_export(run / "ema.safetensors", old.state_dict(), config, step, digest=digest)
        assert_same_samples(load_model(str(run)).model, expected)


def test_a_checkpoint_that_was_removed_meanwhile_is_chosen_again(tmp_path, monkeypatch):
    """By a run that goes on, between the choice and the reading."""
    model = network()
    run = run_folder(tmp_path, network(seed=1), 7)
    first = run / "checkpoints/step_00000007"
    manifest_of = reading.manifest_of

    def late(path):
        if first.exists():
            run_folder(tmp_path, model, 9)
            shutil.rmtree(first)
        return manifest_of(path)

    monkeypatch.setattr(reading, "manifest_of", late)
    assert_same_samples(load_model(str(run)).model, model)
    # a step that was named is not replaced by another
    with pytest.raises(ValueError, match="no checkpoint at"):
        load_model(str(first))
    assert load_model(str(run)).source == run / "checkpoints/step_00000009"


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    run = run_folder(tmp_path, network(num_classes=4), 7)
    with pytest.raises(ValueError, match="do not fit the run's configuration: y_embedder"):
        load_model(str(run))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_fp32(tmp_path, dtype):
    model = network()
    state = {name: value.to(dtype) for name, value in weights(model).items()}
    torch.save(state, tmp_path / "w.pt")
    found = load_model(str(tmp_path / "w.pt"), num_heads=2).model.state_dict()
    for name, value in state.items():
        assert found[name].dtype == torch.float32
        if name != "pos_embed":
            assert torch.equal(found[name], value.float())
    assert torch.allclose(found["pos_embed"], model.pos_embed, atol=1e-2)


BIAS = "blocks.1.attn.proj.bias"


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.full((32,), float("nan")), f"expected finite weights in .*, {BIAS} has NaN or inf"),
        (torch.full((32,), float("-inf")), f"{BIAS} has NaN or infinity"),
        # finite in fp64 only
        (torch.full((32,), 1e300, dtype=torch.float64), f"{BIAS} has NaN or infinity"),
        (
            torch.zeros(32, dtype=torch.int8),
            f"expected floating-point weights in .*, {BIAS} is int8",
        ),
        (torch.zeros(32, dtype=torch.complex64), f"{BIAS} is complex64"),
        (torch.zeros(32, dtype=torch.float8_e4m3fn), f"{BIAS} is float8_e4m3fn"),
        (torch.zeros(32).to_sparse(), f"expected dense weights .*, {BIAS} is sparse_coo"),
        (torch.zeros(32, device="meta"), f"{BIAS} is on the meta device"),
        (torch.zeros(31), rf"do not fit the model: {BIAS} should be \[32\], it is \[31\]"),
        (None, rf"{BIAS} should be \[32\], it is absent"),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, value, message, suffix):
    state = weights(network())
    state[BIAS] = value
    if value is None:
        del state[BIAS]
    path = tmp_path / f"w.{suffix}"
    if suffix == "safetensors" and value is not None and not is_dense(value):
        pytest.skip("safetensors has dense tensors only")
    torch.save(state, path) if suffix == "pt" else save_file(state, path)
    with pytest.raises(ValueError, match=message) as error:
        load_model(str(path), num_heads=2)
    assert "\n" not in str(error.value)


def test_a_run_whose_ema_is_not_finite_is_refused(tmp_path):
    model = network()
    model.blocks[0].mlp.fc1.bias.data[3] = float("nan")
    with pytest.raises(ValueError, match="blocks.0.mlp.fc1.bias has NaN or infinity"):
        load_model(str(run_folder(tmp_path, model)))


def test_unknown_weights_are_refused_and_heads_of_other_methods_named(tmp_path, caplog):
    model = network()
    state = weights(model)
    torch.save({**state, "register_tokens": torch.zeros(1, 4, 32)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="register_tokens should be absent"):
        load_model(str(tmp_path / "w.pt"), num_heads=2)
    torch.save({**state, "projectors.0.weight": torch.zeros(3, 3)}, tmp_path / "w.pt")
    loaded = load_model(str(tmp_path / "w.pt"), num_heads=2)
    assert same(loaded.model.state_dict(), state)
    assert "not read from" in caplog.text and "projectors.0.weight" in caplog.text


def test_what_is_not_read_is_said_once(tmp_path, caplog, monkeypatch):
    """Not for student and EMA, and not by every process."""
    state = {**weights(network()), "projectors.0.weight": torch.zeros(3, 3)}
    args = argparse.Namespace(num_heads=2, path_type="linear", num_classes=10)
    torch.save({"model": state, "ema": state, "args": args}, tmp_path / "w.pt")
    load_model(str(tmp_path / "w.pt"))
    assert [record.getMessage() for record in caplog.records] == [
        f"not read from {tmp_path}/w.pt, nothing here uses it: projectors.0.weight"
    ]
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    load_model(str(tmp_path / "w.pt"))
    assert not caplog.records


INTERPOLANT = "the linear interpolant"
TIME = "noise at time 1, as in REPA and SRA (import-weights reads an official SiT)"
CLASSES = "10 classes and a null class"


@pytest.mark.parametrize(
    "family, without, args, assumed",
    [
        (SiT, ["ap_head."], {}, [INTERPOLANT, TIME, CLASSES]),
        # only what was trained here has the head
        (SiT, [], {}, [INTERPOLANT, CLASSES]),
        (SiT, ["ap_head."], {"num_classes": 10}, [INTERPOLANT, TIME]),
        (SiT, ["ap_head."], {"path_type": "cosine"}, [CLASSES]),
        (SiT, [], {"path_type": "linear", "num_classes": 10}, []),
        (SiT, ["ap_head.", "y_embedder."], {"path_type": "linear"}, []),
        (DiT, ["ap_head."], {}, [CLASSES]),
        (DiT, ["ap_head."], {"num_classes": 10}, []),
    ],
)
def test_what_is_assumed_of_weights_is_said(tmp_path, caplog, family, without, args, assumed):
    held = {"ema": weights(network(family), without)}
    if args:
        held["args"] = argparse.Namespace(**args)
    torch.save(held, tmp_path / "w.pt")
    load_model(str(tmp_path / "w.pt"), num_heads=2)
    said = [text for text in caplog.messages if "does not say how it was trained" in text]
    expected = f"{tmp_path}/w.pt does not say how it was trained, assumed are "
    assert said == ([expected + "; ".join(assumed)] if assumed else [])


def test_nothing_is_assumed_of_what_says_it(tmp_path, caplog):
    """A run's export, and the releases' classes."""
    run = run_folder(tmp_path / "run", network(), 7)
    load_model(str(run))
    model = network(num_classes=1000)
    args = argparse.Namespace(path_type="linear")
    torch.save({"ema": weights(model), "args": args}, tmp_path / "w.pt")
    load_model(str(tmp_path / "w.pt"), num_heads=2)
    assert "assumed" not in caplog.text


@pytest.mark.parametrize("shape", [(32, 4), (32,)])
def test_patches_of_another_layout_are_refused(tmp_path, shape):
    state = {**weights(network()), "x_embedder.proj.weight": torch.zeros(shape)}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"x_embedder.proj.weight of .* should be \[D, C, p, p\]"):
        load_model(str(tmp_path / "w.pt"), num_heads=2)


# position tables


def test_tables_are_regenerated(tmp_path):
    """Without a table the size has to be known; a table of another resolution is of no use."""
    model = network()
    torch.save(weights(model, ["pos_embed"]), tmp_path / "w.pt")
    path = str(tmp_path / "w.pt")
    assert_same_samples(load_model(path, num_heads=2, input_size=8).model, model)
    with pytest.raises(ValueError, match="input_size cannot be read"):
        load_model(path, num_heads=2)
    args = argparse.Namespace(resolution=64, num_heads=2)
    torch.save({"ema": weights(model, ["pos_embed"]), "args": args}, tmp_path / "w.pt")
    assert_same_samples(load_model(path).model, model)
    # an export whose configuration says 8, with the table of 16
    config = {"architecture": {"family": "SiT", "arguments": arguments_of(model)}}
    config["diffusion"] = {"path": "cosine"}
    other = {**weights(model), "pos_embed": network(input_size=16).pos_embed}
    write_export(tmp_path / "e.safetensors", other, config, 3, FACTS)
    loaded = load_model(str(tmp_path / "e.safetensors"))
    assert_same_samples(loaded.model, model)
    assert (loaded.path, loaded.step, loaded.facts) == ("cosine", 3, FACTS)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table * 1.01,
        lambda table: table.flip(1),
        lambda table: table[:, :-1],
        lambda table: table[0],
        lambda table: table.long(),
        lambda table: table[..., :-2],
    ],
)
def test_another_table_is_refused(tmp_path, change):
    state = weights(network())
    torch.save({**state, "pos_embed": change(state["pos_embed"]).clone()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="position embedding of .* is not the fixed 2-d"):
        load_model(str(tmp_path / "w.pt"), num_heads=2)


# what weights do not say


def test_heads_are_honoured_or_refused(tmp_path):
    model = network(num_heads=4)
    save_file(weights(model), tmp_path / "plain.safetensors")
    plain = str(tmp_path / "plain.safetensors")
    assert_same_samples(load_model(plain, num_heads=4).model, model)
    with pytest.raises(ValueError, match="num_heads cannot be read from weights of width 32"):
        load_model(plain)
    config = {"architecture": {"family": "SiT", "arguments": arguments_of(model)}}
    config["diffusion"] = {"path": "linear"}
    write_export(tmp_path / "ours.safetensors", weights(model), config, None)
    ours = str(tmp_path / "ours.safetensors")
    assert_same_samples(load_model(ours, num_heads=4).model, model)
    args = argparse.Namespace(num_heads=4)
    torch.save({"ema": weights(model), "args": args}, tmp_path / "published.pt")
    for path in (ours, str(tmp_path / "published.pt")):
        with pytest.raises(ValueError, match="was made with num_heads 4, got num_heads 2"):
            load_model(path, num_heads=2)
    with pytest.raises(ValueError, match="was made with input_size 8, got input_size 16"):
        load_model(ours, input_size=16)
    with pytest.raises(ValueError, match="table of an input of 8 x 8, got input_size 16"):
        load_model(str(tmp_path / "published.pt"), input_size=16)


@pytest.mark.usefixtures("rooms")
@pytest.mark.parametrize("prediction", ["score", "noise", "x"])
def test_weights_that_predict_something_else_are_refused(tmp_path, prediction):
    """Shapes do not show it; SiT's code can train all of them."""
    file = tmp_path / "w.pt"
    for told in (prediction, "velocity", "v"):
        args = argparse.Namespace(num_heads=2, prediction=told)
        torch.save({"ema": weights(network()), "args": args}, file)
        if told != prediction:
            load_model(str(file))
            continue
        with pytest.raises(ValueError, match=f"weights that predict the velocity, .* {told!r}"):
            load_model(str(file))
        with pytest.raises(ValueError, match=f"weights that predict the velocity, .* {told!r}"):
            read_initial(config("--train.init_from", str(file)))


def test_weights_without_a_head_sample(tmp_path):
    model = network()
    torch.save(weights(model, ["ap_head."]), tmp_path / "w.pt")
    loaded = load_model(str(tmp_path / "w.pt"), num_heads=2)
    assert_same_samples(loaded.model, model)
    assert len(loaded.fresh) == 4 and all(name.startswith("ap_head.") for name in loaded.fresh)
    assert all(not loaded.model.get_parameter(name).any() for name in loaded.fresh)
    torch.save(weights(model, ["ap_head.linear1"]), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="ap_head.linear1.bias should be .* it is absent"):
        load_model(str(tmp_path / "w.pt"), num_heads=2)


@torch.no_grad()
def test_weights_without_classes_are_unconditional(tmp_path, caplog):
    model = network(num_classes=1, class_dropout_prob=0.0)
    model.y_embedder.embedding_table.weight.zero_()
    torch.save(weights(model, ["y_embedder."]), tmp_path / "w.pt")
    loaded = load_model(str(tmp_path / "w.pt"), num_heads=2).model
    x, t, y = torch.randn(2, 1, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.long)
    assert torch.equal(loaded(x, t, y), model(x, t, y))
    assert "unconditional" in caplog.text


def test_only_the_student(tmp_path, caplog):
    model = network()
    args = argparse.Namespace(num_heads=2)
    torch.save({"model": weights(model), "args": args}, tmp_path / "w.pt")
    assert_same_samples(load_model(str(tmp_path / "w.pt")).model, model)
    assert "holds no EMA: its only weights are taken" in caplog.text
    torch.save({"ema": weights(model), "args": args}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="holds no weights 'model', only ema; the student is in"):
        load_model(str(tmp_path / "w.pt"), weights="model")


# an official SiT has the names and shapes of a DiT, and another direction of time


def official(unused: bool) -> dict:
    """A release: 2C output channels and no head. A SiT leaves the second half of them at zero."""
    state = weights(network(DiT), ["ap_head."])
    if unused:
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            state[name] = state[name].unflatten(0, (4, 2))
            state[name][:, 1] = 0
            state[name] = state[name].flatten(0, 1)
    return state


@pytest.mark.parametrize(
    "held",
    [
        official(unused=True),
        {"ema": official(unused=True), "args": argparse.Namespace(model="SiT-XL/2")},
        {"ema": official(unused=False), "args": argparse.Namespace(model="SiT-XL/2")},
        {
            "ema": weights(network(SiT), ["ap_head."]),
            "args": argparse.Namespace(model="SiT-XL/2", path_type="Linear"),
        },
    ],
)
def test_official_sit_is_not_taken_for_ours(tmp_path, held):
    torch.save(held, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="official SiT, whose time runs backwards: import-weights"):
        load_model(str(tmp_path / "w.pt"), num_heads=2)


def test_official_dit_is_taken_as_it_is(tmp_path):
    torch.save(official(unused=False), tmp_path / "w.pt")
    loaded = load_model(str(tmp_path / "w.pt"), num_heads=2)
    assert isinstance(loaded.model, DiT)
    assert_same_samples(loaded.model, network(DiT))


# folders and files that are something else


def test_what_a_folder_or_file_is_not(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint at .*nowhere"):
        load_model(str(tmp_path / "nowhere"))
    (tmp_path / "pipe/transformer").mkdir(parents=True)
    (tmp_path / "pipe/transformer/config.json").write_text('{"_class_name": "DiT"}')
    for folder in (tmp_path / "pipe", tmp_path / "pipe/transformer"):
        with pytest.raises(
            ValueError, match=f"folder of diffusers: import-weights --from {folder} "
        ):
            load_model(str(folder))
    index = shards(tmp_path / "shards", weights(network()))
    (index.parent / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="found 2 indices of shards"):
        load_model(str(index.parent))
    with pytest.raises(ValueError, match="is no index of safetensors files"):
        load_model(str(index.parent / "other.safetensors.index.json"))
    held = json.loads(index.read_text())
    held["weight_map"]["blocks.9.x"] = held["weight_map"]["pos_embed"]
    index.write_text(json.dumps(held))
    with pytest.raises(ValueError, match="lack blocks.9.x"):
        load_model(str(index))
    (index.parent / held["weight_map"]["pos_embed"]).unlink()
    with pytest.raises(ValueError, match="is no readable safetensors file"):
        load_model(str(index))


def test_the_run_that_is_meant_is_named(tmp_path):
    """The folder around the runs, and the one inside of a run."""
    for number in ("002", "010"):
        run_folder(tmp_path / number, network())
    # stopped before its first checkpoint
    (tmp_path / "011").mkdir()
    (tmp_path / "011/config.yaml").write_text("")
    newest = tmp_path / "010"
    for folder in (tmp_path, newest / "checkpoints"):
        with pytest.raises(ValueError, match=f"found none of them; give the run folder {newest}"):
            load_model(str(folder))


@pytest.mark.parametrize(
    "metadata",
    [
        {"config": "yaml: yes"},
        {"config": json.dumps({"model": "unet"}), "step": "x", "data": "[]"},
        {"config": json.dumps({"model": {"name": "unet"}, "diffusion": {"steps": 1000}})},
        {"config": "[]", "data": json.dumps({"num_classes": 3}), "step": "1.5"},
    ],
)
def test_metadata_of_other_projects_says_nothing(tmp_path, metadata):
    model = network()
    save_file(weights(model), tmp_path / "w.safetensors", metadata)
    loaded = load_model(str(tmp_path / "w.safetensors"), num_heads=2)
    assert same(loaded.model.state_dict(), model.state_dict())
    assert (loaded.config, loaded.facts, loaded.step) == (None, None, None)


@pytest.mark.parametrize("text", ["[1, 2]", "3", '{"library_name": "sra-fast", "config": [1]}'])
def test_a_config_json_of_another_form_says_nothing(tmp_path, text):
    model = network()
    save_file(weights(model), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    loaded = load_model(str(tmp_path), num_heads=2)
    assert same(loaded.model.state_dict(), model.state_dict()) and loaded.config is None


def test_pickled_objects_are_named(tmp_path):
    import numpy as np

    torch.save({"ema": weights(network()), "best": np.float64(3)}, tmp_path / "w.pt")
    with pytest.raises(
        ValueError, match="holds a pickled numpy.*save its state dict by itself"
    ) as e:
        load_model(str(tmp_path / "w.pt"))
    assert "\n" not in str(e.value)


def test_a_configuration_of_another_version_is_named(tmp_path):
    config = {"model": {"name": "SiT-S/2", "rope": True}, "diffusion": {"path": "linear"}}
    write_export(tmp_path / "w.safetensors", weights(network()), config, None)
    with pytest.raises(ValueError, match="in .*w.safetensors is .* another version: .*rope"):
        load_model(str(tmp_path / "w.safetensors"))


def test_published_arguments_keep_the_facts(tmp_path):
    args = argparse.Namespace(num_heads=2, data=FACTS.as_json())
    torch.save({"ema": weights(network()), "args": args, "steps": 5}, tmp_path / "w.pt")
    loaded = load_model(str(tmp_path / "w.pt"))
    assert (loaded.facts, loaded.step) == (FACTS, 5)
    assert loaded.model.input_size == SIZES["input_size"]


@pytest.mark.parametrize(
    ("told", "shift"),
    [({"latent_shift": 0.0609}, 0.0609), ({"latent_shift": None}, 0.0), ({}, 0.0)],
)
def test_a_configuration_keeps_the_facts_where_there_are_no_others(tmp_path, told, shift):
    """Runs of older versions had no data.json; the oldest had no shift either."""
    settings = plain(asdict(config()))
    settings["data"] = {"name": "latents", "path": "/x/y", "latent_scale": 1.5305, **told}
    write_export(tmp_path / "w.safetensors", weights(network()), settings, 7)
    facts = load_model(str(tmp_path / "w.safetensors")).facts
    assert facts == DataFacts("latents", (1, 8, 8), 10, path="/x/y", scale=1.5305, shift=shift)


@pytest.fixture(autouse=True)
def said(caplog):
    caplog.set_level(logging.WARNING)
