"""Text encoders give what transformers' own models give of the same prompts, several of them what
Stable Diffusion 3 makes of theirs.
"""

import json
import shutil
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from toy_data import write_text_encoder

from sra_fast.data.text_encoders import load_text_encoders

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
PROMPTS = ["a cat", "", "two dogs 12"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small encoder of every kind."""
    root = tmp_path_factory.mktemp("encoders")
    write_text_encoder(root / "clip")
    write_text_encoder(root / "big", "CLIPTextModelWithProjection", 1, hidden_size=24)
    write_text_encoder(root / "t5", "T5EncoderModel", 2)
    return root


def load(root, *names, **options):
    return load_text_encoders([str(root / name) for name in names], **options)


def seen_by(folder, prompts, tokens, kind, **options):
    """The output of transformers' own model, and the mask of its tokenizer."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    given = tokenizer(
        prompts, padding="max_length", max_length=tokens, truncation=True, return_tensors="pt"
    )
    mask = given.attention_mask
    if options.pop("masked", False):
        options["attention_mask"] = mask
    with torch.no_grad():
        return model(given.input_ids, output_hidden_states=True, **options), mask


def test_clip_alone_gives_its_last_hidden_states_and_its_pooled_vector(made):
    encoders = load(made, "clip")
    sizes = (encoders.tokens, encoders.width, encoders.pooled, encoders.masked)
    assert sizes == (20, 16, 16, False)
    ids, too_long = encoders.tokenize(PROMPTS)
    assert ids.shape == (3, 20) and ids.dtype == torch.int64 and too_long == []
    found = encoders.encode(ids)
    expected, _ = seen_by(made / "clip", PROMPTS, 20, "CLIPTextModel")
    assert torch.equal(found.tokens, expected.last_hidden_state)
    assert torch.equal(found.pooled, expected.pooler_output)
    assert found.mask is None and found.empty is None and found.drop is None
    # that of the end of the prompt, after the last layer's norm
    assert torch.equal(found.pooled[0], found.tokens[0, 5])


def test_a_projection_makes_the_pooled_vector(made):
    encoders = load(made, "big")
    assert (encoders.width, encoders.pooled) == (24, 8)
    found = encoders.encode(encoders.tokenize(PROMPTS)[0])
    expected, _ = seen_by(made / "big", PROMPTS, 20, "CLIPTextModelWithProjection")
    assert torch.equal(found.tokens, expected.last_hidden_state)
    assert torch.equal(found.pooled, expected.text_embeds)
    assert encoders.identity[0]["class"] == "CLIPTextModelWithProjection"


def test_t5_alone_has_a_mask_and_no_pooled_vector(made):
    encoders = load(made, "t5", tokens=12)
    assert (encoders.tokens, encoders.width, encoders.pooled) == (12, 24, 0)
    assert encoders.masked
    found = encoders.encode(encoders.tokenize(PROMPTS)[0])
    expected, mask = seen_by(made / "t5", PROMPTS, 12, "T5EncoderModel", masked=True)
    assert torch.equal(found.mask, mask.bool())
    # the empty prompt is its end
    assert found.mask.sum(1).tolist() == [7, 1, 12]
    assert torch.equal(found.tokens, expected.last_hidden_state)
    assert found.pooled is None
    # what is there is the same whatever the padding
    longer = load(made, "t5", tokens=30)
    again = longer.encode(longer.tokenize(PROMPTS)[0])
    assert torch.allclose(again.tokens[0, :7], found.tokens[0, :7], atol=1e-5)
    assert load(made, "t5").tokens == 256


def test_several_are_joined_as_in_stable_diffusion_3(made):
    """encode_prompt of diffusers' StableDiffusion3Pipeline: the states before CLIP's last layer side
    by side, T5's after them without a mask, zeros up to its width; pooled vectors side by side.
    """
    # wider than T5's 24 together: the wider one decides
    encoders = load(made, "clip", "big", "t5", tokens=12)
    sizes = (encoders.tokens, encoders.width, encoders.pooled, encoders.masked)
    assert sizes == (20 + 12, 16 + 24, 16 + 8, False)
    found = encoders.encode(encoders.tokenize(PROMPTS)[0])
    one, _ = seen_by(made / "clip", PROMPTS, 20, "CLIPTextModel")
    two, _ = seen_by(made / "big", PROMPTS, 20, "CLIPTextModelWithProjection")
    t5, _ = seen_by(made / "t5", PROMPTS, 12, "T5EncoderModel")
    clips = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
    assert not torch.equal(clips[..., :16], one.last_hidden_state)
    t5 = F.pad(t5.last_hidden_state, (0, 40 - 24))
    assert torch.equal(found.tokens, torch.cat([clips, t5], dim=-2))
    assert torch.equal(found.pooled, torch.cat([one.pooler_output, two.text_embeds], dim=-1))
    assert found.mask is None
    layers = [encoder["layer"] for encoder in encoders.identity]
    assert layers == ["penultimate", "penultimate", "last"]
    # the order of the folders is CLIP's own; T5 comes last wherever it is named
    other = load(made, "t5", "clip", "big", tokens=12)
    assert torch.equal(other.encode(other.tokenize(PROMPTS)[0]).tokens, found.tokens)


def test_clips_are_padded_to_a_wider_t5(made, tmp_path):
    write_text_encoder(tmp_path / "wide", "T5EncoderModel", d_model=50)
    encoders = load_text_encoders([str(made / "clip"), str(tmp_path / "wide")], tokens=5)
    assert (encoders.tokens, encoders.width, encoders.pooled) == (25, 50, 16)
    tokens = encoders.encode(encoders.tokenize(PROMPTS)[0]).tokens
    one, _ = seen_by(made / "clip", PROMPTS, 20, "CLIPTextModel")
    assert torch.equal(tokens[:, :20, :16], one.hidden_states[-2])
    assert tokens[:, :20, 16:].abs().max() == 0
    t5, _ = seen_by(tmp_path / "wide", PROMPTS, 5, "T5EncoderModel")
    assert torch.equal(tokens[:, 20:], t5.last_hidden_state)


def test_diffusers_own_pipeline_agrees(made, tmp_path):
    """Its encode_prompt, called with our encoders: the same numbers."""
    pytest.importorskip("diffusers", reason="needs diffusers")
    import transformers
    from diffusers import StableDiffusion3Pipeline

    for number, name in (("", "clip"), ("_2", "big"), ("_3", "t5")):
        if name == "clip":
            # the pipeline takes the first output for the pooled vector: a projection's
            kind = "CLIPTextModelWithProjection"
            write_text_encoder(tmp_path / "text_encoder", kind, hidden_size=8)
        else:
            shutil.copytree(made / name, tmp_path / f"text_encoder{number}")
    write_text_encoder(tmp_path / "text_encoder_3", "T5EncoderModel", 2, d_model=40)
    folders = [tmp_path / f"text_encoder{number}" for number in ("", "_2", "_3")]
    kinds = ("CLIPTextModelWithProjection", "CLIPTextModelWithProjection", "T5EncoderModel")
    models = [
        getattr(transformers, kind).from_pretrained(folder)
        for kind, folder in zip(kinds, folders, strict=True)
    ]
    tokenizers = [transformers.AutoTokenizer.from_pretrained(folder) for folder in folders]
    pipeline = StableDiffusion3Pipeline(
        transformer=None,
        scheduler=None,
        vae=None,
        text_encoder=models[0],
        tokenizer=tokenizers[0],
        text_encoder_2=models[1],
        tokenizer_2=tokenizers[1],
        text_encoder_3=models[2],
        tokenizer_3=tokenizers[2],
    )
    with torch.no_grad():
        expected, _, pooled, _ = pipeline.encode_prompt(
            PROMPTS,
            None,
            None,
            device="cpu",
            do_classifier_free_guidance=False,
            max_sequence_length=12,
        )
    encoders = load_text_encoders([str(folder) for folder in folders], tokens=12)
    found = encoders.encode(encoders.tokenize(PROMPTS)[0])
    assert torch.equal(found.tokens, expected)
    assert torch.equal(found.pooled, pooled)


def test_prompts_that_are_too_long_are_counted(made):
    prompts = ["a" * 18, "a" * 19, "b", "c" * 40]
    encoders = load(made, "clip")
    ids, too_long = encoders.tokenize(prompts)
    assert too_long == [1, 3]
    assert ids.shape == (4, 20)
    # cut, with the end's token at the end
    assert ids[3, -1] == ids[3].max() and ids[0, -1] == ids[1, -1]
    # what one of several sees whole is not cut off
    assert load(made, "clip", "t5", tokens=30).tokenize(prompts)[1] == [3]
    assert load(made, "clip", tokens=8).tokenize(["abcdef", "abcdefg"])[1] == [1]
    assert load(made, "clip").tokenize([])[0].shape == (0, 20)


def test_the_same_batch_gives_the_same_bits_and_bf16_is_near(made):
    encoders = load(made, "clip", "t5", tokens=12)
    ids, _ = encoders.tokenize(PROMPTS)
    one = encoders.encode(ids)
    assert torch.equal(one.tokens, encoders.encode(ids).tokens)
    rough = encoders.to("cpu", "bf16").encode(ids)
    assert rough.tokens.dtype == rough.pooled.dtype == torch.float32
    assert 0 < (rough.tokens - one.tokens).norm() / one.tokens.norm() < 0.05


def test_whole_models_and_diffusers_folders_have_the_same_encoders(made, tmp_path):
    import transformers

    t5 = transformers.T5EncoderModel.from_pretrained(made / "t5")
    whole = transformers.T5ForConditionalGeneration(t5.config)
    whole.encoder.load_state_dict(t5.encoder.state_dict())
    whole.shared.load_state_dict(t5.shared.state_dict())
    whole.save_pretrained(tmp_path / "t5")
    text = transformers.CLIPTextModel.from_pretrained(made / "clip")
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**vision, "intermediate_size": 16, "image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(
        text_config=text.config.to_dict() | {"projection_dim": 512},
        vision_config=vision,
        projection_dim=8,
    )
    clip = transformers.CLIPModel(config)
    clip.text_model.load_state_dict(text.state_dict())
    clip.save_pretrained(tmp_path / "clip")
    for name in ("clip", "t5"):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(made / name / file, tmp_path / name)
        assert load(tmp_path, name).identity == load(made, name).identity
    # joined with others, a whole CLIP gives the projected vector that SD3 has
    joined = load_text_encoders([str(tmp_path / "clip"), str(made / "big")])
    assert joined.identity[0]["class"] == "CLIPTextModelWithProjection"
    found = joined.encode(joined.tokenize(PROMPTS)[0]).pooled[:, :8]
    ids = load(made, "clip").tokenize(PROMPTS)[0]
    with torch.no_grad():
        states = clip.text_model(ids).pooler_output
        assert torch.allclose(found, clip.text_projection(states), atol=1e-6)
    # as what an older version loaded it
    kinds = ["CLIPTextModel", "CLIPTextModelWithProjection"]
    before = load_text_encoders([str(tmp_path / "clip"), str(made / "big")], kinds=kinds)
    assert [encoder["class"] for encoder in before.identity] == kinds
    assert torch.equal(before.encode(before.tokenize(PROMPTS)[0]).pooled[:, :16], states)
    # diffusers has the tokenizer in a folder beside the encoder's
    for number, name in (("", "clip"), ("_3", "t5")):
        encoder = tmp_path / f"text_encoder{number}"
        tokenizer = tmp_path / f"tokenizer{number}"
        encoder.mkdir()
        tokenizer.mkdir()
        for file in (made / name).iterdir():
            shutil.copy(file, tokenizer if file.name.startswith("tokenizer") else encoder)
        assert load(tmp_path, encoder.name).identity == load(made, name).identity


def test_the_identity_is_that_of_weights_settings_and_vocabulary(made, tmp_path):
    first = load(made, "clip").identity[0]
    assert (first["class"], first["tokens"], first["layer"]) == ("CLIPTextModel", 20, "last")
    assert load(made, "clip", tokens=8).identity[0]["sha256"] == first["sha256"]
    for name in ("other", "settings", "vocabulary"):
        shutil.copytree(made / "clip", tmp_path / name)
    write_text_encoder(tmp_path / "other", seed=9)
    config = json.loads((made / "clip/config.json").read_text())
    changed = {**config, "hidden_act": "gelu", "transformers_version": "0"}
    (tmp_path / "settings/config.json").write_text(json.dumps(changed))
    tokenizer = (made / "clip/tokenizer.json").read_text()
    swapped = tokenizer.replace('"a": 0', '"a": 1').replace('"b": 1', '"b": 0')
    assert swapped != tokenizer
    (tmp_path / "vocabulary/tokenizer.json").write_text(swapped)
    for name in ("other", "settings", "vocabulary"):
        assert load(tmp_path, name).identity[0]["sha256"] != first["sha256"], name


@pytest.mark.parametrize(
    "change, message",
    [
        ("nowhere", "must name folders of text encoders, there is no config.json in .*nowhere$"),
        ("vision", "must hold a text encoder, CLIP or T5, its model_type is vit$"),
        ("no type", "config.json is no configuration of a model: 'model_type' is missing"),
        ("two types", "CLIP or T5, its model_type is \\['t5'\\]$"),
        ("no tokenizer", "there is no tokenizer in .*no tokenizer$"),
        ("broken", "broken holds no readable CLIPTextModel: "),
        ("lacking", "lacks 1 weights of its CLIPTextModel, the first is final_layer_norm.bias$"),
        ("small", "at most the model's 30 tokens and one for padding, it has 74, and <|endoftext"),
        ("end", "must end a prompt with token 5, it ends it with 73$"),
    ],
)
def test_what_is_no_text_encoder_is_one_line(made, tmp_path, change, message):
    folder = tmp_path / change
    if change != "nowhere":
        shutil.copytree(made / "clip", folder)
    config = json.loads((made / "clip/config.json").read_text())
    if change == "vision":
        (folder / "config.json").write_text('{"model_type": "vit"}')
    elif change == "no type":
        (folder / "config.json").write_text("{}")
    elif change == "two types":
        (folder / "config.json").write_text('{"model_type": ["t5"]}')
    elif change == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif change == "broken":
        (folder / "model.safetensors").write_bytes(b"no weights")
    elif change == "lacking":
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        name = next(name for name in weights if name.endswith("final_layer_norm.bias"))
        del weights[name]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif change == "small":
        write_text_encoder(tmp_path / "few", vocab_size=30, eos_token_id=29, bos_token_id=28)
        for file in ("config.json", "model.safetensors"):
            shutil.copy(tmp_path / "few" / file, folder)
    elif change == "end":
        (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 5}))
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "names, tokens, message",
    [
        (("clip",), 21, "text_tokens must be from 3 on, and at most 20 for .*clip, got 21"),
        (("t5",), 2, "text_tokens must be from 3 on, .* got 2"),
        ((), None, "text_encoders must name the folder of a text encoder, got nothing"),
        (("clip", "short"), None, r"CLIP encoders must have one number of tokens, .*\[12, 20\]"),
    ],
)
def test_lengths_that_cannot_be_are_one_line(made, tmp_path, names, tokens, message):
    if "short" in names:
        write_text_encoder(tmp_path / "short", max_position_embeddings=12)
    paths = [str((tmp_path if name == "short" else made) / name) for name in names]
    with pytest.raises(ValueError, match=message):
        load_text_encoders(paths, tokens)


def test_without_transformers_there_is_one_line(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="needs transformers: pip install 'sra-fast\\[text\\]'"):
        load(made, "clip")
