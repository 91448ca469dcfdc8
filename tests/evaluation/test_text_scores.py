"""CLIP score and PickScore are what a hand computes with the same model, prompt by prompt."""

import json
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from launch import call, error_of
from PIL import Image
from toy_data import write_text_encoder

from sra_fast.data.prompts import as_lines, digest_of
from sra_fast.evaluation.run import Options, run
from sra_fast.evaluation.text_scores import load_text_scorer

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
MEAN = [0.48, 0.46, 0.41]
STD = [0.27, 0.26, 0.28]
PROMPTS = ["a cat", "dog on mat", "", "word", "w", "the longest of all prompts here", "cat"]
SIDE = 12


def write_clip(folder, encoder, seed=0):
    """A small CLIPModel with random weights, the tokenizer of a text encoder."""
    import transformers

    torch.manual_seed(seed)
    text = transformers.CLIPTextModel.from_pretrained(encoder).config.to_dict()
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"intermediate_size": 16, "image_size": SIDE, "patch_size": 4}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=8, logit_scale_init_value=1.5
    )
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(encoder / file, folder)
    held = {"image_mean": MEAN, "image_std": STD, "size": {"shortest_edge": SIDE}, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(held))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("clip")
    write_text_encoder(root / "encoder")
    write_clip(root / "clip", root / "encoder")
    write_clip(root / "pick", root / "encoder", seed=1)
    return root


def images(count=7, height=18, width=20, channels=3):
    return np.random.RandomState(0).randint(0, 256, (count, height, width, channels), np.uint8)


def write_samples(folder, pixels, prompts=PROMPTS):
    """What sample.py leaves."""
    folder.mkdir()
    np.savez(folder / "samples.npz", arr_0=pixels, arr_1=np.arange(len(pixels)))
    (folder / "prompts.jsonl").write_text(as_lines(prompts))
    origin = {"step": 3, "weights": "ema", "prompts_sha256": digest_of(prompts), "data": None}
    (folder / "samples.json").write_text(json.dumps(origin))
    return str(folder)


def by_hand(folder, pixels, prompts) -> torch.Tensor:
    """Cosines, one pair at a time, with the towers of the model and float64 arithmetic."""
    import transformers

    model = transformers.CLIPModel.from_pretrained(folder).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    # under its old name where a version has one only
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    preprocess = processor(**sizes, image_mean=MEAN, image_std=STD)
    for image, prompt in zip(pixels, prompts, strict=True):
        picture = Image.fromarray(image.squeeze()).convert("RGB")
        x = preprocess(picture, return_tensors="pt")["pixel_values"].double()
        ids = tokenizer(prompt, truncation=True, max_length=20, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            a = model.visual_projection(model.vision_model(pixel_values=x).pooler_output)[0]
            b = model.text_projection(model.text_model(input_ids=ids).pooler_output)[0]
        found.append(a @ b / (a.norm() * b.norm()))
    return torch.stack(found)


@pytest.mark.parametrize("sides", [{}, {"channels": 1}, {"height": 31, "width": 15}])
def test_scores_are_those_of_a_hand(sides, made, tmp_path):
    """Of wide images and of tall ones: the middle is seen of both."""
    pixels = images(**sides)
    samples = write_samples(tmp_path / "samples", pixels)
    given = {"clip_score": str(made / "clip"), "pick_score": str(made / "pick")}
    out = {"out": str(tmp_path / "x.json"), "per_image": str(tmp_path / "each.npz")}
    report = run(Options(samples=samples, batch=4, **given, **out))
    clip, pick = (by_hand(made / name, pixels, PROMPTS) for name in ("clip", "pick"))
    # of both signs, so that the bound at zero matters
    assert (clip > 0.05).any() and (clip < -0.05).any()
    assert report["clip_score"] == pytest.approx(100 * clip.clamp(min=0).mean().item(), abs=1e-3)
    assert report["clip_cosine"] == pytest.approx(clip.mean().item(), abs=1e-5)
    scale = load_text_scorer(str(made / "pick")).logit_scale
    assert scale == pytest.approx(np.exp(1.5), rel=0.5) and scale != pytest.approx(np.exp(1.5))
    assert report["pick_score"] == pytest.approx(scale * pick.mean().item(), abs=1e-4)
    assert (report["step"], report["samples"]["images"]) == (3, 7)
    with np.load(tmp_path / "each.npz") as held:
        np.testing.assert_allclose(held["clip_score"], clip, atol=1e-5)
        np.testing.assert_allclose(held["pick_score"], pick, atol=1e-5)
    assert json.loads((tmp_path / "x.json").read_text()) == json.loads(json.dumps(report))


def test_the_command_says_what_was_compared(made, tmp_path, caplog):
    """Beside the Fréchet distance, in one table; a folder of files has the prompts in a file."""
    folder = tmp_path / "png"
    folder.mkdir()
    for i, image in enumerate(images(height=SIDE, width=SIDE)):
        Image.fromarray(image).save(folder / f"{i}.png")
    (tmp_path / "prompts.txt").write_text("\n".join(prompt or "nothing" for prompt in PROMPTS))
    np.savez(tmp_path / "reference.npz", arr_0=images(9, SIDE, SIDE))
    done = call(
        *("evaluate", "--samples", folder, "--reference", tmp_path / "reference.npz"),
        *("--features", "pixels", "--clip_score", made / "clip", "--device", "cpu"),
        *("--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "scores.json"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("extractor: ") and lines[1] == f"clip_score by {made / 'clip'}"
    report = json.loads((tmp_path / "scores.json").read_text())
    expected = by_hand(
        made / "clip", images(height=SIDE, width=SIDE), [p or "nothing" for p in PROMPTS]
    )
    assert report["clip_cosine"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert report["fid"] > 0 and report["step"] is None
    sha256 = report["text_models"]["clip_score"]["sha256"]
    assert [line.split()[:2] for line in lines if line.startswith("clip_")][1:] == [
        ["clip_score", f"{report['clip_score']:.4f}"],
        ["clip_cosine", f"{report['clip_cosine']:.4f}"],
    ]
    assert f"the same model ({sha256[:8]})" in report["comparable"]["clip_score"]
    assert "1 of 7 prompts are longer than the 20 tokens of clip_score" in done.stderr + caplog.text


def test_the_identity_is_that_of_the_model(made, tmp_path):
    shutil.copytree(made / "clip", tmp_path / "copy")
    held = json.loads((tmp_path / "copy/preprocessor_config.json").read_text())
    first = load_text_scorer(str(made / "clip")).identity
    assert load_text_scorer(str(tmp_path / "copy")).identity["sha256"] == first["sha256"]
    other = {**held, "image_std": [1, 1, 1]}
    (tmp_path / "copy/preprocessor_config.json").write_text(json.dumps(other))
    for folder in (tmp_path / "copy", made / "pick"):
        assert load_text_scorer(str(folder)).identity["sha256"] != first["sha256"]


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"size": {"shortest_edge": 224}}, "must have size 12, the side that the model sees"),
        ({"crop_size": {"height": 12, "width": 10}}, "must have crop_size 12"),
        ({"size": [12]}, r"must have size 12, the side that the model sees .*, got \[12\]"),
        ({"size": {"longest_edge": 12}}, "must have size 12, .* got {'longest_edge': 12}"),
        ({"size": {"height": 12, "width": 12}}, "must have size 12, .*shortest_edge.* got {'hei"),
        ({"size": {"shortest_edge": 12, "longest_edge": 12}}, "must have size 12"),
        ({"crop_size": {"shortest_edge": 12}}, "must have crop_size 12"),
        ({"do_resize": False}, "must have do_resize true, .* got False"),
        ({"do_center_crop": False}, "must have do_center_crop true, .* got False"),
        ({"resample": 2}, r"must have resample 3 \(bicubic\), got 2"),
        ({"image_mean": None}, "must hold image_mean and image_std"),
    ],
)
def test_images_are_seen_as_the_model_is_used_to(changed, message, made, tmp_path):
    shutil.copytree(made / "clip", tmp_path / "copy")
    file = tmp_path / "copy/preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    with pytest.raises(ValueError, match=message):
        load_text_scorer(str(tmp_path / "copy"))


@pytest.mark.parametrize(
    "written",
    [
        # as the first releases have it, and as later versions save it
        {"size": 12, "crop_size": 12, "do_resize": True, "do_center_crop": True},
        {"size": {"shortest_edge": 12}, "crop_size": {"height": 12, "width": 12}},
    ],
)
def test_the_ways_to_say_the_usual_preprocessing(written, made, tmp_path):
    shutil.copytree(made / "clip", tmp_path / "copy")
    file = tmp_path / "copy/preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **written}))
    assert load_text_scorer(str(tmp_path / "copy")).size == SIDE


def test_no_output_replaces_an_input_of_text(made, tmp_path):
    pixels = images()
    np.savez(tmp_path / "t.npz", arr_0=pixels)
    (tmp_path / "t.json").write_text(json.dumps(PROMPTS))
    shutil.copytree(made / "clip", tmp_path / "clip")
    given = {
        "samples": str(tmp_path / "t.npz"),
        "prompts": str(tmp_path / "t.json"),
        "clip_score": str(tmp_path / "clip"),
    }
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for out, message in (
        ({"per_image": given["samples"]}, "per_image .*t.npz would replace samples"),
        ({"out": given["samples"]}, "out .*t.npz would replace samples"),
        ({"out": given["prompts"]}, "out .*t.json would replace prompts"),
        ({"out": str(tmp_path / "clip/config.json")}, "would replace a file of clip_score"),
    ):
        with pytest.raises(ValueError, match=message):
            run(Options(**{"out": str(tmp_path / "x.json"), **given, **out}))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_what_does_not_belong_together_is_one_line(made, tmp_path):
    samples = write_samples(tmp_path / "samples", images())
    few = write_samples(tmp_path / "few", images(5))
    none = write_samples(tmp_path / "none", images())
    changed = write_samples(tmp_path / "changed", images())
    (tmp_path / "none/prompts.jsonl").unlink()
    (tmp_path / "changed/prompts.jsonl").write_text(as_lines(PROMPTS[::-1]))
    # samples.json and prompts.jsonl may belong to samples that were made later
    renamed = write_samples(tmp_path / "renamed", images()) + "/first.npz"
    (tmp_path / "renamed/samples.npz").rename(renamed)
    classes = tmp_path / "classes"
    for name in ("a", "b"):
        (classes / name).mkdir(parents=True)
        Image.fromarray(images()[0]).save(classes / name / "0.png")
    damaged = write_samples(tmp_path / "damaged", images())
    (tmp_path / "damaged/samples.json").write_text("[]")
    for folder, names in (("unpadded", ("2", "10")), ("named", ("image_2", "image_10"))):
        (tmp_path / folder).mkdir()
        for name in names:
            Image.fromarray(images()[0]).save(tmp_path / f"{folder}/{name}.png")
    clip = {"clip_score": str(made / "clip")}
    cases = [
        ({"samples": few, **clip}, "5 images, .*few/prompts.jsonl has 7 prompts"),
        ({"samples": none, **clip}, "give --prompts, .*: there is no .*none/prompts.jsonl"),
        (
            {"samples": renamed, **clip},
            "give --prompts, .* beside a samples.npz .*, got .*first.npz",
        ),
        ({"samples": changed, **clip}, "has other prompts than those that .*samples.json tells"),
        ({"samples": samples, "prompts": "a cat", **clip}, "prompts must be a file .* no a cat"),
        ({"samples": str(classes), "prompts": "x", **clip}, "classes has several folders"),
        (
            {"samples": str(tmp_path / "unpadded"), "prompts": "x", **clip},
            "has numbers of different",
        ),
        (
            {"samples": str(tmp_path / "named"), "prompts": "x", **clip},
            "has numbers of different",
        ),
        ({"samples": damaged, **clip}, "samples.json must hold an object"),
        ({"samples": samples, "clip_score": str(made / "encoder")}, "its model_type is clip_text"),
        ({"samples": samples, "clip_score": "nowhere"}, "a CLIP model needs nowhere/config.json"),
        (clip, "expected samples to score"),
        ({"samples": samples}, "or clip_score or pick_score, the folder of a CLIPModel"),
        ({"samples": samples, "reference": "x", **clip}, "reference is compared by features"),
        ({"samples": samples, "prompts": "x", "features": "pixels"}, "prompts is for clip_score"),
        ({"samples": samples, "per_image": "x", **clip}, "per_image must end in .npz"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            run(Options(out=str(tmp_path / "x.json"), **given))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "x.json").exists()
    done = call("evaluate", "--samples", few, "--pick_score", made / "pick", cwd=tmp_path)
    assert done.returncode == 2
    assert error_of(done).startswith("error: a prompt for each image was expected")
