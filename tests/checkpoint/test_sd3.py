"""SD3's files and folders of diffusers as MMDiTs, and back."""

import argparse
import json
from dataclasses import replace

import pytest
import torch
from foreign import prefixed, same, weights
from foreign_text import FACTS, SD3_PLACES, STEP, TEXT
from foreign_text import text_batch as batch
from foreign_text import text_network as network
from golden import assert_matches
from launch import call, error_of
from safetensors.torch import load_file, save_file
from toy_data import write_vae

from sra_fast.checkpoint.diffusers_folder import import_pipeline, write_pipeline
from sra_fast.checkpoint.load_model import LoadedModel, load_model
from sra_fast.checkpoint.official_weights import import_file
from sra_fast.checkpoint.sd3_weights import block_from_diffusers, block_to_diffusers
from sra_fast.config.schema import DiffusionConfig
from sra_fast.diffusion.samplers import sample
from sra_fast.models import MMDiT, arguments_of
from sra_fast.models.layers import sincos_pos_embed
from sra_fast.models.mmdit import JointBlock

LAST_QUERIES = "joint_blocks.1.context_block.attn.ln_q.weight"


@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
@pytest.mark.parametrize("pre_only", [False, True])
def test_a_block_is_that_of_diffusers(qk_norm, pre_only):
    attention = pytest.importorskip("diffusers.models.attention")
    torch.manual_seed(0)
    theirs = attention.JointTransformerBlock(16, 2, 8, context_pre_only=pre_only, qk_norm=qk_norm)
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.3)
    modulations = 2 if pre_only else 6
    how = dict(context_output=not pre_only, context_modulations=modulations)
    ours = JointBlock(16, 2, 4.0, qk_norm is not None, **how)
    ours.load_state_dict(block_from_diffusers(theirs.state_dict()), strict=True)
    x, context, c = torch.randn(3, 7, 16), torch.randn(3, 4, 16), torch.randn(3, 16)
    expected_context, expected = theirs(x, context, c)
    silu = torch.nn.functional.silu(c)
    x, (y, gate, _), context, pending = ours(x, silu, None, context, silu)
    found = [x + gate[:, None] * y]
    assert_matches(found[0], expected)
    expectations = [expected]
    assert (context is None) == (expected_context is None) == pre_only
    if not pre_only:
        found.append(context + pending[1][:, None] * pending[0])
        expectations.append(expected_context)
        assert_matches(found[1], expected_context)
    sum(out.sin().sum() for out in found).backward()
    sum(out.sin().sum() for out in expectations).backward()
    # gradients are renamed as the weights are
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, gradient in block_from_diffusers(gradients).items():
        assert_matches(ours.get_parameter(name).grad, gradient)
    back = block_to_diffusers(ours.state_dict())
    left = "attn.norm_added_q.weight" if pre_only and qk_norm else None
    for name, value in theirs.state_dict().items():
        # nothing reads the result of these queries
        same = torch.ones_like(value) if name == left else value
        assert torch.equal(back.pop(name), same)
    assert not back


def sd3(seed=0, **sizes) -> MMDiT:
    return network(seed, qk_norm=True, **{**SD3_PLACES, **sizes})


def sd3_state(model, largest=12) -> dict:
    """An MMDiT's weights as SD3's file has them: the table of the largest image, a norm of queries
    that nothing reads, no head of ours.
    """
    state = weights(model, ["ap_head.", "pos_embed"])
    # positions 0, 1/3, 2/3, ..
    state["pos_embed"] = sincos_pos_embed(largest, model.hidden_size, 0.0, STEP).half()
    state[LAST_QUERIES] = torch.full((8,), 3.0)
    return state


@torch.no_grad()
def test_a_file_of_sd3(tmp_path):
    model = sd3()
    file, out = str(tmp_path / "sd3.safetensors"), str(tmp_path / "w.safetensors")
    others = {"first_stage_model.conv.weight": torch.zeros(1)}
    save_file(prefixed(sd3_state(model), "model.diffusion_model.") | others, file)
    with pytest.raises(ValueError, match="looks like SD3 .* import-weights --from"):
        load_model(file)
    done = call("import_weights", "--from", file, "--out", out)
    assert "expected --input_size, the side of the latents" in error_of(done)
    done = call("import_weights", "--from", file, "--out", out, "--input_size", 8)
    assert done.returncode == 0, done.stderr
    # what its release samples at
    assert load_model(out).diffusion == DiffusionConfig(time_shift=3.0)
    found = load_model(out).model
    # START is (12 - 4) / 2 patches of STEP
    for name, value in arguments_of(model).items():
        assert arguments_of(found)[name] == pytest.approx(value), name
    assert same(
        weights(found, ["ap_head.", "pos_embed"]), weights(model, ["ap_head.", "pos_embed"])
    )
    assert_matches(found(*batch(model)), model(*batch(model)), 1e-6)
    assert found.ap_head.linear1.weight.std() > 0
    # another size and another scale of the times can be asked for
    import_file(file, None, out, input_size=16, time_scale=1.0)
    assert load_model(out).diffusion == DiffusionConfig()
    found = load_model(out).model
    assert (found.input_size, found.time_scale) == (16, 1.0)
    assert found.position_start == pytest.approx(2 * STEP)


def test_an_mmdit_with_arguments_has_their_times(tmp_path):
    """It is not taken for SD3, which has none: its times are shifted as they say, or not."""
    model = sd3()
    out = tmp_path / "w.safetensors"
    for told, shift in ({}, 1.0), ({"time_shift": 2.0}, 2.0):
        args = argparse.Namespace(time_scale=1000.0, path_type="linear", **told)
        torch.save({"ema": sd3_state(model), "args": args}, tmp_path / "w.pt")
        import_file(str(tmp_path / "w.pt"), None, str(out), input_size=8)
        assert load_model(str(out)).diffusion == DiffusionConfig(time_shift=shift)


@pytest.mark.parametrize(
    "change, options, message",
    [
        ({}, dict(input_size=26), "at most 12 x 12 patches, .* got 13 x 13"),
        ({}, dict(input_size=8, name="MMDiT-S/2"), "no MMDiT-S/2: depth should be 12, it is 2"),
        ({}, dict(input_size=8, name="SiT-S/2"), "are of an MMDiT, .* expected no --model SiT-S/2"),
        (
            {"joint_blocks.0.x_block.attn2.qkv.weight": torch.zeros(48, 16)},
            dict(input_size=8),
            "second attention, as SD3.5-medium has, .* expected no joint_blocks.0.x_block.attn2",
        ),
        (
            {},
            dict(input_size=8, time_scale=float("nan")),
            "time_scale must be a positive number, got nan",
        ),
        ({}, dict(input_size=8, time_scale=0.0), "time_scale must be a positive number, got 0.0"),
        ({"pos_embed": torch.zeros(1, 144, 16)}, dict(input_size=8), "position embedding"),
        # a tensor without dimensions is none of a network: the file has no table
        ({"pos_embed": torch.zeros(())}, dict(input_size=8), "SD3 and has no position table"),
        (
            {"context_embedder.weight": torch.zeros(192)},
            dict(input_size=8),
            r"context_embedder.weight should be a matrix, it is \[192\]",
        ),
        (
            {"x_embedder.proj.weight": torch.zeros(16, 4, 0, 2)},
            dict(input_size=8),
            r"x_embedder.proj.weight should be \[D, C, p, p\], it is \[16, 4, 0, 2\]",
        ),
        (
            {"joint_blocks.0.context_block.attn.ln_q.weight": torch.zeros(3)},
            dict(input_size=8),
            r"joint_blocks.0.context_block.attn.ln_q.weight should be \[8\], it is \[3\]",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, change, options, message):
    save_file({**sd3_state(sd3()), **change}, tmp_path / "sd3.safetensors")
    out = tmp_path / "w.safetensors"
    name = options.pop("name", None)
    with pytest.raises(ValueError, match=message):
        import_file(str(tmp_path / "sd3.safetensors"), name, str(out), **options)
    assert not out.exists()


# diffusers


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A random SD3 of diffusers, and the folder of its transformer."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=6,
        pos_embed_max_size=7,
        qk_norm="rms_norm",
    ).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("sd3") / "transformer"
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def test_the_prediction_is_that_of_diffusers(theirs, tmp_path):
    transformer, folder = theirs
    import_pipeline(str(folder.parent), str(tmp_path / "w.safetensors"))
    model = load_model(str(tmp_path / "w.safetensors")).model
    assert (model.time_scale, model.qk_norm, model.pooled_size) == (1000.0, True, 6)
    # base size 4, largest 7: the middle begins after one patch
    assert model.position_step == pytest.approx(4 / 7)
    assert model.position_start == pytest.approx(4 / 7)
    x, t, text = batch(model)
    expected = transformer(x, text.tokens, text.pooled, 1000 * t).sample
    assert_matches(model(x, t, text), expected)
    # both directions of time and both signs give something else
    assert (model(x, 1 - t, text) - expected).abs().max() > 0.01 * expected.abs().max()


@torch.no_grad()
def test_a_pipeline_there_and_back(theirs, tmp_path, monkeypatch):
    import diffusers

    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, latent_channels=4
    )
    vae.save_pretrained(tmp_path / "vae")
    import_pipeline(str(theirs[1]), str(tmp_path / "w.safetensors"))
    loaded = replace(load_model(str(tmp_path / "w.safetensors")), facts=FACTS)
    loaded = replace(loaded, diffusion=DiffusionConfig(time_shift=2.5))
    out = tmp_path / "pipeline"
    write_pipeline(loaded, out, str(tmp_path / "vae"))
    # names, numbers and shapes of diffusers; the table is that of the size, the unread norm is one
    file = "diffusion_pytorch_model.safetensors"
    before, after = load_file(theirs[1] / file), load_file(out / "transformer" / file)
    norm = "transformer_blocks.1.attn.norm_added_q.weight"
    assert torch.equal(after.pop(norm), torch.ones_like(before.pop(norm)))
    table = before.pop("pos_embed.pos_embed").view(7, 7, 16)[1:5, 1:5].reshape(1, 16, 16)
    assert_matches(after.pop("pos_embed.pos_embed"), table)
    assert same(before, after)
    # the text encoders are given, or as here the features of the prompts
    names = [f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")]
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
        out, local_files_only=True, **dict.fromkeys(names)
    )
    assert (pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor) == (1.5, 0.06)
    x, t, text = batch(loaded.model)
    predicted = pipe.transformer(x, text.tokens, text.pooled, 1000 * t).sample
    assert_matches(predicted, loaded.model(x, t, text))
    images = pipe(
        prompt_embeds=text.tokens,
        pooled_prompt_embeds=text.pooled,
        num_inference_steps=2,
        guidance_scale=1.0,
        height=8,
        width=8,
        output_type="np",
    ).images
    assert images.shape == (3, 8, 8, 3)
    # at our times, 1 to 1 / steps before they are shifted, it makes our samples
    z = torch.randn(3, 4, 8, 8)
    latents = pipe(
        prompt_embeds=text.tokens,
        pooled_prompt_embeds=text.pooled,
        sigmas=[1.0, 0.8, 0.6, 0.4, 0.2],
        guidance_scale=1.0,
        latents=z.clone(),
        output_type="latent",
    ).images
    ours = sample(loaded.model, z, text, "euler", 5, time_shift=loaded.diffusion.time_shift)
    assert_matches(latents.double(), ours)
    assert not torch.allclose(ours, sample(loaded.model, z, text, "euler", 5))
    # a relative path leads to the VAE from other folders as well
    monkeypatch.chdir(tmp_path)
    import_pipeline("pipeline", "back.safetensors")
    back = load_model("back.safetensors")
    assert back.facts.vae_path == str(out / "vae")
    assert same(weights(back.model, ["ap_head."]), weights(loaded.model, ["ap_head."]))
    assert (back.facts.scale, back.facts.shift) == (1.5, 0.06)
    assert back.diffusion == DiffusionConfig(time_shift=2.5)
    for name, value in arguments_of(loaded.model).items():
        assert arguments_of(back.model)[name] == pytest.approx(value), name


def test_a_vae_that_the_pipeline_would_decode_as_another_is_refused(tmp_path):
    """sample.py follows its statistics where the weights do not know their data."""
    statistics = dict(latents_mean=[0.0, 2.0, -1.0, 0.5], latents_std=[1.0, 0.2, 3.0, 2.0])
    vae = write_vae(tmp_path / "vae", **statistics)
    loaded = LoadedModel(sd3(), DiffusionConfig())
    with pytest.raises(ValueError, match="knows one scale and one shift, those of the VAE have"):
        write_pipeline(loaded, tmp_path / "out", str(vae))
    assert not (tmp_path / "out").exists()
    shifted = write_vae(tmp_path / "shifted", shift_factor=0.9)
    write_pipeline(loaded, tmp_path / "out", str(shifted))
    held = json.loads((tmp_path / "out/vae/config.json").read_text())
    assert held["shift_factor"] == 0.9


CLIP = ("CLIPTextModelWithProjection", 77)


@pytest.mark.parametrize(
    "encoders, advice",
    [
        ([CLIP, CLIP, ("T5EncoderModel", 256)], None),
        ([CLIP, CLIP, ("T5EncoderModel", 120)], "give the pipeline max_sequence_length=120"),
        ([CLIP, CLIP], "give the pipeline max_sequence_length=0"),
        ([CLIP], "other features of prompts than CLIPTextModelWithProjection: give it prompt_em"),
        ([("T5EncoderModel", 256)], "other features of prompts than T5EncoderModel: give it"),
        ([("CLIPTextModel", 77), CLIP], "than CLIPTextModel and CLIPTextModelWithProjection: giv"),
        (None, None),
    ],
)
def test_how_the_pipeline_makes_the_captions_features_is_said(tmp_path, caplog, encoders, advice):
    pytest.importorskip("diffusers", reason="needs diffusers")
    told = [{"class": kind, "tokens": tokens} for kind, tokens in encoders or []] or None
    facts = replace(
        FACTS, text={**TEXT, "encoders": told}, vae_path=str(write_vae(tmp_path / "vae"))
    )
    write_pipeline(LoadedModel(sd3(), DiffusionConfig(), facts), tmp_path / "out")
    assert (advice in caplog.text) if advice else not caplog.text


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(dual_attention_layers=[0]), "second attention, .* got .0"),
        (dict(qk_norm="layer_norm"), "expected qk_norm rms_norm or none .* got layer_norm"),
        (dict(qk_norm=None), "qk_norm should be False, it is True"),
        (dict(out_channels=8), "expected out_channels 4 .* got 8"),
        (dict(caption_projection_dim=8), "expected caption_projection_dim 16 .* got 8"),
        (dict(num_layers=1), "expected 1 blocks, the weights have transformer_blocks.1"),
        (dict(pooled_projection_dim=None), "expected a number pooled_projection_dim .* got None"),
    ],
)
def test_another_configuration_is_refused(theirs, tmp_path, change, message):
    held = json.loads((theirs[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**held, **change}))
    file = "diffusion_pytorch_model.safetensors"
    (tmp_path / file).symlink_to(theirs[1] / file)
    with pytest.raises(ValueError, match=message):
        import_pipeline(str(tmp_path), str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize(
    "sizes, changes, message",
    [
        (dict(pooled_size=0), {}, "takes a pooled feature of the captions"),
        (dict(time_scale=1.0), {}, "has times up to 1000, the model multiplies them by 1 "),
        (dict(mlp_ratio=2.0), {}, "has an mlp_ratio of 4, the model has 2"),
        (
            {},
            dict(diffusion=DiffusionConfig(path="cosine")),
            "has the interpolant linear, the model cosine",
        ),
        ({}, dict(facts=replace(FACTS, pixels=True)), "the model makes images"),
        (
            {},
            dict(facts=replace(FACTS, scale=[0.5, 1.0, 2.0, 0.7])),
            "StableDiffusion3Pipeline knows one scale of the latents, .* have 0.5 to 2, by channel",
        ),
        ({}, dict(facts=FACTS), "the VAE carries the scale of the latents, 1.5: expected --vae"),
        (
            {},
            dict(facts=replace(FACTS, text={**TEXT, "masked": True})),
            "captions have masks",
        ),
    ],
)
def test_what_sd3_cannot_hold_is_refused(tmp_path, sizes, changes, message):
    pytest.importorskip("diffusers")
    loaded = replace(LoadedModel(sd3(**sizes), DiffusionConfig()), **changes)
    with pytest.raises(ValueError, match=message):
        write_pipeline(loaded, tmp_path / "out")
    assert not (tmp_path / "out").exists()
