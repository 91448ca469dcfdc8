"""DiT and diffusers: the same weights both ways, a folder that the pipeline loads, and what differs."""

import json
import logging
import re
import shutil
from dataclasses import replace

import pytest
import torch
from foreign import network, same, weights
from golden import assert_matches
from launch import call, error_of
from safetensors.torch import load_file, save_file
from toy_data import write_vae

from sra_fast.checkpoint.diffusers_folder import import_pipeline, write_pipeline
from sra_fast.checkpoint.diffusers_weights import (
    STEPS_HERE,
    STEPS_THERE,
    fold_time,
    from_diffusers,
    time_features,
    to_diffusers,
    with_null_row,
    without_null_rows,
)
from sra_fast.checkpoint.load_model import LoadedModel, load_model
from sra_fast.config.schema import DiffusionConfig
from sra_fast.data.facts import DataFacts
from sra_fast.data.vae import load_vae, vae_identity
from sra_fast.diffusion.gaussian_diffusion import Schedule, linear_betas
from sra_fast.diffusion.samplers import sample
from sra_fast.models import DiT, SiT
from sra_fast.models.layers import timestep_features
from sra_fast.sampling.decoder import choose_decoder

diffusers = pytest.importorskip("diffusers")

NAMES = ["tench", "goldfish", "great white shark", "tiger shark", "hammerhead"]
FACTS = DataFacts("latents", (4, 8, 8), 5, class_names=NAMES, scale=0.3)
NULL = 1000


def dit(seed=0, **sizes) -> DiT:
    return network(DiT, seed, in_channels=4, num_classes=5, depth=3, **sizes)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    diffusers.AutoencoderKL(
        block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, latent_channels=4
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, vae):
    """A folder with everything, its model and the loaded pipeline."""
    folder = tmp_path_factory.mktemp("pipeline")
    model = dit()
    write_pipeline(LoadedModel(model, DiffusionConfig(), FACTS), folder, str(vae))
    return folder, model, loaded_pipeline(folder)


def loaded_pipeline(folder, **parts):
    return diffusers.DiTPipeline.from_pretrained(folder, local_files_only=True, **parts)


def batch():
    torch.manual_seed(1)
    t = torch.tensor([0, 999, 500, 1, 250, 731])
    labels = torch.arange(6)  # 5 is the null class
    return torch.randn(6, 4, 8, 8), t, labels


def theirs(pipe, x, t, labels):
    labels = torch.where(labels == 5, NULL, labels)
    return pipe.transformer(x, timestep=t, class_labels=labels).sample


def relative_rms(a, b) -> float:
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


@torch.no_grad()
def test_the_prediction_is_the_same_but_for_the_sinusoid(pipeline):
    """With diffusers' features of the time both networks compute the same."""
    _, model, pipe = pipeline
    x, t, labels = batch()
    expected = theirs(pipe, x, t, labels)
    features = pipe.transformer.transformer_blocks[0].norm1.emb.time_proj(t)
    assert_matches(model(x, features, labels), expected, 1e-6)
    # fold_time fits to these features, from ours
    assert_matches(time_features(STEPS_THERE)[t], features, 1e-3)
    assert_matches(time_features(STEPS_HERE)[t], timestep_features(t), 1e-3)


@torch.no_grad()
def test_the_difference_of_the_sinusoid(pipeline, tmp_path, vae):
    """docs/weights.md has these numbers: relative RMS of the output, random weights."""
    _, model, pipe = pipeline
    x, _, _ = batch()
    x = x.repeat(20, 1, 1, 1)
    t = torch.linspace(0, 999, 120).long()
    labels = torch.arange(120) % 6
    ours = model(x, t, labels)
    plain = relative_rms(theirs(pipe, x, t, labels), ours)
    write_pipeline(LoadedModel(model, DiffusionConfig(), FACTS), tmp_path, str(vae), fold=True)
    folded = relative_rms(theirs(loaded_pipeline(tmp_path), x, t, labels), ours)
    assert abs(plain - 0.126) < 2e-3
    assert abs(folded - 0.063) < 2e-3


def test_low_frequencies_fold_and_high_ones_cannot():
    """What ``fold_time`` leaves of each feature, in float64."""
    eye = torch.eye(256)
    state = {"t_embedder.mlp.0.weight": eye, "t_embedder.mlp.0.bias": torch.zeros(256)}
    folded = fold_time(state, STEPS_HERE, STEPS_THERE)
    weight = folded["t_embedder.mlp.0.weight"].double()
    found = time_features(STEPS_THERE) @ weight.mT + folded["t_embedder.mlp.0.bias"].double()
    wanted = time_features(STEPS_HERE)
    left = ((found - wanted).square().mean(0) / wanted.square().mean(0)).sqrt()[:128]
    assert left[48:].max() < 1e-2
    assert left[5:25].min() > 0.3
    # weights that fp32 holds
    assert weight.abs().max() < 10


def test_weights_there_and_back_are_the_same_bits(pipeline, tmp_path):
    folder, model, _ = pipeline
    import_pipeline(str(folder), str(tmp_path / "back.safetensors"))
    back = load_model(str(tmp_path / "back.safetensors"))
    assert same(weights(back.model, ["ap_head."]), weights(model, ["ap_head."]))
    assert back.model.ap_head.linear1.weight.std() > 0
    facts = back.facts
    assert (facts.scale, facts.class_names, facts.num_classes) == (0.3, NAMES, 5)
    # the transformer's folder by itself, in half precision and in shards
    half = diffusers.DiTTransformer2DModel.from_pretrained(folder / "transformer").bfloat16()
    half.save_pretrained(tmp_path / "half", max_shard_size="100KB")
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 1
    import_pipeline(str(tmp_path / "half"), str(tmp_path / "half.safetensors"))
    back = load_model(str(tmp_path / "half.safetensors")).model
    for name, value in weights(model, ["ap_head.", "pos_embed"]).items():
        assert torch.equal(back.state_dict()[name], value.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_stored_table_of_other_places_is_refused(scale, dtype):
    """Old versions of diffusers stored it, and could stretch it."""
    patch_embed = diffusers.models.embeddings.PatchEmbed(8, 8, 2, 4, 32, interpolation_scale=scale)
    # weights are read as fp32
    table = {"pos_embed.pos_embed": patch_embed.pos_embed.to(dtype).float()}
    state = {**to_diffusers(weights(dit(), ["ap_head.", "pos_embed"]), 3), **table}
    if scale == 1:
        assert "pos_embed" not in from_diffusers(state, 3)
        return
    with pytest.raises(ValueError, match="another position table"):
        from_diffusers(state, 3)


def test_the_vae_is_found_from_another_folder(pipeline, tmp_path, monkeypatch):
    """The pipeline was named by a relative path, as it is in examples."""
    folder = pipeline[0]
    monkeypatch.chdir(folder.parent)
    import_pipeline(folder.name, str(tmp_path / "w.safetensors"))
    assert load_model(str(tmp_path / "w.safetensors")).facts.vae_path == str(folder / "vae")


def test_the_scheduler_is_our_chain(pipeline):
    _, _, pipe = pipeline
    assert_matches(pipe.scheduler.alphas_cumprod, Schedule(linear_betas()).alpha_bar, 1e-6)
    assert (
        pipe.scheduler.config.prediction_type == "epsilon" and not pipe.scheduler.config.clip_sample
    )
    # no spacing of diffusers is ours, which keeps both ends: this one is the nearest
    _, model, _ = pipeline
    z = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(0))
    ours = sample(model, z, torch.tensor([1, 4]), "ddim", 25)
    distances = {}
    for spacing in ("leading", "linspace", "trailing"):
        scheduler = type(pipe.scheduler).from_config(
            pipe.scheduler.config, timestep_spacing=spacing
        )
        scheduler.set_timesteps(25)
        x = z
        for t in scheduler.timesteps:
            eps = model(x, t.expand(2), torch.tensor([1, 4])).chunk(2, 1)[0]
            x = scheduler.step(eps, t, x).prev_sample
        distances[spacing] = ((x - ours).square().mean() / ours.square().mean()).sqrt().item()
    assert min(distances, key=distances.__getitem__) == "trailing", distances
    assert pipe.scheduler.config.timestep_spacing == "trailing"


def test_the_pipeline_samples_with_guidance(pipeline):
    """Its null class is label 1000 whatever the number of classes."""
    _, model, pipe = pipeline
    assert pipe.labels == {name: i for i, name in enumerate(NAMES)}
    assert pipe.get_label_ids(["goldfish"]) == [1]
    assert pipe.vae.config.scaling_factor == 0.3
    table = pipe.transformer.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight
    ours = model.y_embedder.embedding_table.weight
    assert torch.equal(table[NULL], ours[5]) and torch.equal(table[:5], ours[:5])
    call = lambda: pipe(
        [0, 4], num_inference_steps=2, output_type="np", generator=torch.manual_seed(0)
    )
    first = call().images
    assert first.shape == (2, 8, 8, 3) and (first == call().images).all() and first.std() > 0


def test_the_scale_is_not_lost_without_a_vae(tmp_path, vae):
    """The pipeline has it from its VAE: that of the data is taken, and else --vae is asked for."""
    scaled = replace(FACTS, scale=1.5305)
    out = tmp_path / "out"
    for path in (None, str(tmp_path / "gone")):
        with pytest.raises(ValueError, match="the scale of the latents, 1.5305, .* expected --vae"):
            write_pipeline(
                LoadedModel(dit(), DiffusionConfig(), replace(scaled, vae_path=path)), out
            )
    for facts, message in (
        (replace(scaled, shift=0.3), "does not shift latents, the model's have a shift of 0.3"),
        (DataFacts("pixels", (4, 8, 8), 5, pixels=True), "makes images, DiTPipeline decodes"),
    ):
        with pytest.raises(ValueError, match=message):
            write_pipeline(LoadedModel(dit(), DiffusionConfig(), facts), out)
    assert not out.exists()
    write_pipeline(LoadedModel(dit(), DiffusionConfig(), replace(scaled, vae_path=str(vae))), out)
    assert loaded_pipeline(out).vae.config.scaling_factor == 1.5305


def test_an_import_keeps_which_vae_it_was(pipeline, tmp_path):
    """Another one at sampling is noticed, by its scale or by its encoder."""
    out = str(tmp_path / "w.safetensors")
    import_pipeline(str(pipeline[0]), out)
    facts = load_model(out).facts
    assert facts.vae == vae_identity(load_vae(str(pipeline[0] / "vae")))
    assert facts.scale == facts.vae["scaling_factor"] == 0.3
    assert choose_decoder(None, None, None, 4, facts).normalization.scale == 0.3
    other = write_vae(tmp_path / "other", latent_channels=4, scaling_factor=0.13)
    with pytest.raises(ValueError, match="other has scaling_factor 0.13, that of .* data has 0.3"):
        choose_decoder(str(other), None, None, 4, facts)


@pytest.mark.parametrize("value", [None, "x", [1.0, 2.0], 0, -1.0])
def test_a_scale_of_the_vae_that_is_none_is_refused(pipeline, tmp_path, value):
    """An import with it would be one that no command can read."""
    shutil.copytree(pipeline[0], tmp_path / "copy")
    file = tmp_path / "copy/vae/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "scaling_factor": value}))
    out = tmp_path / "w.safetensors"
    with pytest.raises(ValueError, match=f"scaling_factor .*{file}.* got {re.escape(repr(value))}"):
        import_pipeline(str(tmp_path / "copy"), str(out))
    assert not out.exists()


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(shift_factor=0.9), "a scale of 0.3 and a shift of 0.9"),
        (
            dict(latents_mean=[0.0, 0.0, 0.0, 0.0], latents_std=[1.0, 2.0, 1.0, 1.0]),
            "a scale of 0.15 to 0.3, by channel",
        ),
    ],
)
def test_a_vae_that_the_pipeline_would_decode_as_another_is_refused(tmp_path, options, said):
    """sample.py follows the VAE where the weights do not know their data."""
    folder = write_vae(tmp_path / "vae", latent_channels=4, scaling_factor=0.3, **options)
    loaded = LoadedModel(dit(), DiffusionConfig(), None)
    with pytest.raises(ValueError, match=f"and no shift, those of the VAE have {said}"):
        write_pipeline(loaded, tmp_path / "out", str(folder))
    assert not (tmp_path / "out").exists()


def test_without_a_vae_the_pipeline_is_given_one(tmp_path, vae):
    write_pipeline(LoadedModel(dit(), DiffusionConfig(), None), tmp_path)
    assert not (tmp_path / "vae").exists()
    decoder = diffusers.AutoencoderKL.from_pretrained(vae)
    pipe = loaded_pipeline(tmp_path, vae=decoder)
    assert pipe.vae is decoder and pipe.labels == {}
    # a VAE that an earlier export has left is not the pipeline's
    (tmp_path / "vae").mkdir()
    with pytest.raises(ValueError, match="has a VAE of before: expected --vae"):
        write_pipeline(LoadedModel(dit(), DiffusionConfig(), None), tmp_path)


def test_null_rows():
    table = torch.arange(12.0).view(6, 2)
    assert with_null_row(table).shape == (1001, 2)
    assert torch.equal(without_null_rows(with_null_row(table)), table)
    full = torch.arange(2002.0).view(1001, 2)
    assert torch.equal(without_null_rows(with_null_row(full)), full)
    assert len(without_null_rows(torch.zeros(1001, 2))) == 2


@pytest.mark.parametrize(
    "model, facts, message",
    [
        (network(SiT), None, "has classes for DiT and MMDiT, the weights are of a SiT"),
        (dit(qk_norm=True), None, "no qk_norm"),
        (dit(mlp_ratio=2), None, "mlp_ratio of 4, the model has 2"),
        (dit(class_dropout_prob=0.0), None, "has a null class, the model has none"),
        (network(DiT, num_classes=1001), None, "expected at most 1000 classes, got 1001"),
        (dit(), DataFacts("latents", (4, 8, 8), 5, shift=0.1), "have a shift of 0.1"),
        (
            dit(),
            DataFacts("latents", (4, 8, 8), 5, scale=[0.5, 1.0, 2.0, 0.7]),
            "DiTPipeline knows one scale of the latents, the model's have 0.5 to 2, by channel",
        ),
        (
            dit(),
            DataFacts("latents", (4, 8, 8), 5, shift=[0.5, 1.0, 2.0, 0.7]),
            "DiTPipeline knows one shift of the latents, the model's have 0.5 to 2, by channel",
        ),
        (
            dit(),
            DataFacts("pixels", (4, 8, 8), 5, pixels=True),
            "makes images, DiTPipeline decodes latents",
        ),
        (network(DiT, in_channels=3), None, "is for latents of 4 channels, the model has 3"),
    ],
)
def test_what_diffusers_cannot_hold_is_refused(tmp_path, vae, model, facts, message):
    with pytest.raises(ValueError, match=message):
        write_pipeline(LoadedModel(model, DiffusionConfig(), facts), tmp_path / "out", str(vae))
    assert not (tmp_path / "out").exists()


def test_unequal_embedders_and_other_weights_are_refused():
    state = to_diffusers(weights(dit()), 3)
    name = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_2.bias"
    with pytest.raises(ValueError, match=f"{name} differs from that of block 0"):
        from_diffusers({**state, name: state[name] + 1e-3}, 3)
    with pytest.raises(ValueError, match="they have no transformer_blocks.3"):
        from_diffusers(state, 4)
    with pytest.raises(ValueError, match="expected no transformer_blocks.2"):
        from_diffusers(state, 2)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(_class_name="FluxTransformer2DModel"),
            "expected a DiT .* got FluxTransformer2DModel",
        ),
        (
            dict(_class_name="SD3Transformer2DModel"),
            "expected a number joint_attention_dim .* None",
        ),
        (dict(activation_fn="geglu"), "expected activation_fn gelu-approximate .* got geglu"),
        (dict(norm_elementwise_affine=True), "expected norm_elementwise_affine False"),
        (dict(interpolation_scale=2), "places of a DiT .interpolation_scale 1. in .*, got 2"),
        # diffusers' own default for images so large
        (
            dict(_class_name="Transformer2DModel", sample_size=128),
            "places of a DiT .interpolation_scale 1. in .*, got 2",
        ),
        (dict(norm_eps=1e-2), "expected norm_eps of at most 1e-5 .* got 0.01"),
        (dict(out_channels=4), "expected 8 output channels, noise and variance, got 4"),
        (dict(sample_size=None), "expected a number sample_size in .*, got None"),
        (dict(num_layers=2), "expected no transformer_blocks.2"),
        (dict(num_attention_heads=4), "do not fit the model"),
    ],
)
def test_another_configuration_is_refused(pipeline, tmp_path, change, message):
    folder = tmp_path / "transformer"
    folder.mkdir()
    config = json.loads((pipeline[0] / "transformer/config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    name = "diffusion_pytorch_model.safetensors"
    save_file(load_file(pipeline[0] / "transformer" / name), folder / name)
    done = call("import_weights", "--from", tmp_path, "--out", tmp_path / "w.safetensors")
    assert done.returncode == 2
    assert re.search(message, error_of(done))
    assert not (tmp_path / "w.safetensors").exists()


def test_the_commands(pipeline, tmp_path, caplog):
    """Import and export again: the same tensors, and the line about diffusers' other epsilon."""
    caplog.set_level(logging.WARNING)
    folder = pipeline[0]
    file = tmp_path / "w.safetensors"
    done = call("import_weights", "--from", folder, "--out", file)
    assert done.returncode == 0 and done.stdout.strip() == str(file), done.stderr
    out = ("--format", "diffusers", "--out", tmp_path / "again", "--vae", folder / "vae")
    done = call("export", "--checkpoint", file, *out)
    assert done.returncode == 0, done.stderr
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert same(load_file(tmp_path / "again" / name), load_file(folder / name))
    loaded_pipeline(tmp_path / "again")

    for args, message in (
        (("--model", "DiT-XL/2"), "says its model itself: expected no --model DiT-XL/2"),
        (("--num_heads", 3), "expected no --num_heads 3"),
    ):
        done = call("import_weights", "--from", folder, "--out", file, *args)
        assert done.returncode == 2 and message in error_of(done)
    done = call("import_weights", "--from", file, "--out", tmp_path / "b.safetensors")
    assert "--model must say what the weights are" in error_of(done)
    args = ("--model", "DiT-S/2", "--out", tmp_path / "b.safetensors")
    assert "needs no conversion" in error_of(call("import_weights", "--from", file, *args))
    done = call("sample", "--checkpoint", folder, "--out", tmp_path / "s")
    assert f"folder of diffusers: import-weights --from {folder}" in error_of(done)


def test_a_full_disk_leaves_nothing_or_what_was_there(tmp_path, vae, monkeypatch):
    loaded = LoadedModel(dit(), DiffusionConfig(), FACTS)
    out = tmp_path / "old"
    write_pipeline(loaded, out, str(vae))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sra_fast.checkpoint.pipeline_parts.write_json", full)
    for folder in ("old", "new/pipeline"):
        with pytest.raises(OSError, match="No space left"):
            write_pipeline(
                LoadedModel(dit(seed=1), DiffusionConfig(), FACTS), tmp_path / folder, str(vae)
            )
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_pipeline_does_not_replace_the_vae_that_it_reads(tmp_path, vae):
    out = tmp_path / "pipeline"
    write_pipeline(LoadedModel(dit(), DiffusionConfig(), FACTS), out, str(vae))
    before = (out / "vae/config.json").read_text()
    other = LoadedModel(dit(), DiffusionConfig(), replace(FACTS, scale=0.7))
    with pytest.raises(ValueError, match="out .*/vae would replace vae .*/vae: expected another"):
        write_pipeline(other, out, str(out / "vae"))
    assert (out / "vae/config.json").read_text() == before
    # the same command again is no such case
    write_pipeline(other, out, str(vae))
    assert json.loads((out / "vae/config.json").read_text())["scaling_factor"] == 0.7
