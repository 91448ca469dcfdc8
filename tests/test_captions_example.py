"""examples/captions.py: what its captions say is true, what it holds out is held out, and its
encoder is one that the programs take.
"""

import hashlib
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sra_fast.data.digits import Digits
from sra_fast.data.pixels import PackedPixels
from sra_fast.data.preprocess import Options, make_jobs
from sra_fast.data.prompts import as_lines, read_prompts
from sra_fast.data.text_encoders import load_text_encoders
from sra_fast.data.writer import run_jobs

EXAMPLE = Path(__file__).parents[1] / "examples/captions.py"
WORDS = "zero one two three four five six seven eight nine".split()


@pytest.fixture(scope="module")
def example() -> dict:
    return runpy.run_path(str(EXAMPLE))


def run(*words) -> None:
    """The program in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["captions.py", *map(str, words)])
        threads = torch.get_num_threads()
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("captions")
    run("make", folder, "--steps", 2)
    return folder


def captions_in(folder: Path) -> list[list[str]]:
    return [file.read_text().splitlines() for file in sorted(folder.glob("*.txt"))]


def digits_in(text: str) -> list[int]:
    """All that a text names."""
    words = re.findall(r"\w+", text)
    return [WORDS.index(word) if word in WORDS else int(word) for word in words if is_digit(word)]


def is_digit(word: str) -> bool:
    return word in WORDS or word.isdecimal()


def test_images_are_the_training_digits(made):
    digits = Digits()
    files = sorted((made / "images").glob("*.png"))
    images = torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files]))
    # 17 levels do not divide 256: the nearest ones are taken
    assert (images / 127.5 - 1 - digits.images[:, 0]).abs().max() <= 0.5 / 127.5 + 1e-6
    assert len(images.unique()) == 17


def test_captions_are_true(made):
    digits = Digits()
    ink = digits.images.sum((1, 2, 3))
    captions = captions_in(made / "images")
    assert len(captions) == len(digits)
    said = {"bold": 0, "thin": 0, None: 0}
    for lines, label, amount in zip(captions, digits.labels, ink, strict=True):
        assert len(set(lines)) == len(lines) == 8
        others = ink[digits.labels == label]
        for text in lines:
            assert digits_in(text) == [label]
            word = next((word for word in ("bold", "thin") if word in text), None)
            said[word] += 1
            # only a third of the images of this digit has still more ink, or still less
            if word is not None:
                beyond = others > amount if word == "bold" else others < amount
                assert beyond.double().mean() < 0.34
    assert min(said.values()) > 1000


def test_nothing_has_seen_the_form_that_is_held_out(made, example):
    captions = {text for lines in captions_in(made / "images") for text in lines}
    held_out = example["held_out_prompts"]()
    assert {digits_in(text)[0] for text in held_out} == {*range(10)}
    assert not captions & held_out.keys()
    words = {word for text in captions for word in text.split()}
    assert words & {"please", "draw", "for", "me"} == set()
    encoder = load_text_encoders([str(made / "text_encoder")])
    ids, too_long = encoder.tokenize([*held_out])
    assert too_long == []
    # begin, "please", "draw", "the", "number"
    unknown = ids[0] == ids[0, 1]
    assert unknown.nonzero().flatten().tolist() == [1, 2, 6, 7]
    # they differ in the digit only
    assert (ids != ids[0]).any(0).nonzero().flatten().tolist() == [5]


def test_prompts_name_every_digit_as_often(made, example):
    captions = {text for lines in captions_in(made / "images") for text in lines}
    for name in ("seen", "held_out"):
        prompts = read_prompts([str(made / "prompts" / f"{name}.txt")])
        assert prompts == [*example[f"{name}_prompts"]()]
        assert [digits_in(text) for text in prompts] == [[i % 10] for i in range(len(prompts))]
    # forms of captions, though not each of them has been drawn for each digit
    forms = {re.sub("|".join((*WORDS, r"\d")), "", text) for text in captions}
    seen = example["seen_prompts"]()
    assert {re.sub("|".join((*WORDS, r"\d")), "", text) for text in seen} <= forms


def test_the_program_that_packs_takes_images_captions_and_encoder(made, tmp_path):
    options = Options(
        source=str(made / "images"),
        out=str(tmp_path / "packed"),
        pixels=True,
        channels=1,
        resolution=8,
        captions=["txt"],
        text_encoders=[str(made / "text_encoder")],
    )
    for _ in run_jobs(make_jobs(options)):
        pass
    data = PackedPixels(str(tmp_path / "packed"))
    data.open_text()
    assert data.shape == (1, 8, 8) and len(data) == len(Digits())
    assert (data.text.tokens, data.text.width, data.text.pooled) == (12, 64, 64)
    captions = captions_in(made / "images")
    assert data.text.caption(700, 5) == captions[700][5]
    encoder = load_text_encoders(options.text_encoders)
    expected = encoder.encode(encoder.tokenize([captions[700][0]])[0])
    found = data.text.read([700])
    assert torch.allclose(found.tokens.float(), expected.tokens, atol=4e-3)
    assert torch.allclose(found.pooled.float(), expected.pooled, atol=4e-3)


def test_a_finished_encoder_is_kept_and_an_unfinished_one_made_again(made, capsys):
    weights = made / "text_encoder/model.safetensors"
    digest = lambda: hashlib.sha256(weights.read_bytes()).hexdigest()
    before = digest()
    run("make", made, "--steps", 2)
    assert "text_encoder: is there" in capsys.readouterr().out and digest() == before
    # a run that was interrupted while it wrote
    (made / "text_encoder/recipe.json").unlink()
    weights.write_bytes(b"half")
    run("make", made, "--steps", 2)
    assert "finds the digit" in capsys.readouterr().out and digest() == before


def save_samples(folder: Path, images: torch.Tensor, prompts: list[str]) -> None:
    """As sample.py does."""
    folder.mkdir(parents=True)
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    np.savez(folder / "samples.npz", arr_0=pixels.numpy())
    (folder / "prompts.jsonl").write_text(as_lines(prompts))


@pytest.mark.parametrize("shift, accuracy", [(0, 1), (1, 0)])
def test_scores_of_real_digits(tmp_path, capsys, example, shift, accuracy):
    """With their own prompts, and with those of other digits."""
    digits = Digits()
    ink = digits.images.mean((1, 2, 3))

    def image_of(digit: int, bold: bool) -> torch.Tensor:
        """The one with the most or the least ink."""
        rows = (digits.labels == digit).nonzero().flatten()
        return digits.images[rows[ink[rows].argsort()[-1 if bold else 0]]]

    for name in ("seen", "held_out"):
        prompts = example[f"{name}_prompts"]()
        images = [image_of((digit + shift) % 10, "bold" in text) for text, digit in prompts.items()]
        save_samples(tmp_path / name, torch.stack(images), [*prompts])
    run("score", tmp_path)
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["accuracy_seen"] == scores["accuracy_held_out"] == accuracy
    if shift == 0:
        assert scores["accuracy_bold_thin"] == 1


def test_scores_of_other_samples_are_one_line(tmp_path, example):
    with pytest.raises(SystemExit) as stopped:
        run("score", tmp_path)
    expected = f"error: expected samples of prompts in {tmp_path}/seen, there is no prompts.jsonl"
    assert stopped.value.code == expected
    save_samples(tmp_path / "seen", torch.zeros(1, 1, 8, 8), ["a cat"])
    with pytest.raises(SystemExit) as stopped:
        run("score", tmp_path)
    expected = f"error: {tmp_path}/seen must hold samples of seen.txt, it has 'a cat'"
    assert stopped.value.code == expected
    (tmp_path / "seen/samples.npz").unlink()
    with pytest.raises(SystemExit, match="there is no samples.npz$"):
        run("score", tmp_path)
    with pytest.raises(SystemExit, match="^error: .*Not a directory"):
        run("make", tmp_path / "seen/prompts.jsonl")


def test_it_needs_transformers(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit) as stopped:
        run("make", tmp_path / "new")
    assert re.match("error: captions.py needs transformers: pip install", stopped.value.code)
    assert not (tmp_path / "new").exists()
