"""Digits with captions in words, and a text encoder that knows these words, without a download:

python examples/captions.py make data/captions
python examples/captions.py score RUN

FOLDER/images holds the training digits and their captions, FOLDER/text_encoder a small CLIP text
encoder that has learned from both, and FOLDER/prompts what to sample for. One form of words is in no
caption at all: it shows what the encoder and the model make of a sentence that they have not seen.
"""

import argparse
import hashlib
import json
import os
import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sra_fast.data.digits import Digits
from sra_fast.data.vision import quiet
from sra_fast.evaluation.digits import read_digits
from sra_fast.utils.files import read_json, write_json

WORDS = "zero one two three four five six seven eight nine".split()
# a caption is made of three parts
OPENINGS = ("", "a picture of", "an image of", "this is", "here you see")
NAMES = (
    *("{figure}", "{word}", "the digit {figure}", "the digit {word}"),
    *("the number {figure}", "the number {word}", "a handwritten {figure}", "a handwritten {word}"),
)
ENDINGS = ("", "written by hand", "in grey", "on black")
# of an image with much or little ink one of these parts may say so
WEIGHED_NAMES = ("a {weight} {figure}", "a {weight} {word}")
WEIGHED_ENDING = ", {weight}"
WEIGHTS = ("bold", "thin")
# captions of an image
CAPTIONS = 8
# in no caption; of its words "please", "draw", "for" and "me" are in none either
HELD_OUT = "please draw the number {word} for me"

# of the text encoder
WIDTH = 64
TOKENS = 12
BATCH = 128
LR = 2e-3
# share of the words that it does not get to see while it learns
UNKNOWN = 0.15
SPECIAL = ("<begin>", "<end>", "<pad>", "<unknown>")
BEGIN, END, PAD, UNK = range(len(SPECIAL))


# captions


def fill(form: str, digit: int, weight: str = "") -> str:
    return form.format(word=WORDS[digit], figure=digit, weight=weight)


def join(parts: tuple[str, ...]) -> str:
    return " ".join(filter(None, parts)).replace(" ,", ",")


def ink_of(images: Tensor) -> Tensor:
    """``[N]`` of images ``[N, 1, 8, 8]``: how bright they are."""
    return images.mean((1, 2, 3))


def inks_of_digits(shares: list[float]) -> Tensor:
    """``[10, len(shares)]``: the ink that this share of a digit's images has at most."""
    digits = Digits()
    ink = ink_of(digits.images)
    at = torch.tensor(shares)
    return torch.stack([ink[digits.labels == digit].quantile(at) for digit in range(10)])


def weights_of(digits: Digits) -> list[str]:
    """``bold``, ``thin`` or an empty text for each image: how much ink it has, compared with the
    images of the same digit.
    """
    low, high = inks_of_digits([1 / 3, 2 / 3])[digits.labels].T
    ink = ink_of(digits.images)
    states = (ink >= high).int() - (ink <= low).int()
    return [{1: "bold", -1: "thin", 0: ""}[state] for state in states.tolist()]


PLAIN_FORMS = [*map(join, product(OPENINGS, NAMES, ENDINGS))]
WEIGHED_FORMS = [
    *map(join, product(OPENINGS, WEIGHED_NAMES, ENDINGS)),
    *map(join, product(OPENINGS, NAMES, [WEIGHED_ENDING])),
]


def captions_of(digits: Digits) -> list[list[str]]:
    """Some of what is true of each image."""
    rng = np.random.default_rng(0)
    captions = []
    for digit, weight in zip(digits.labels.tolist(), weights_of(digits), strict=True):
        forms = PLAIN_FORMS + WEIGHED_FORMS if weight else PLAIN_FORMS
        chosen = rng.choice(forms, CAPTIONS, replace=False)
        captions.append([fill(form, digit, weight) for form in chosen])
    return captions


def seen_prompts() -> dict[str, int]:
    """Forms that captions have -> their digits, from 0 to 9 for each form."""
    forms = [(form, "") for form in PLAIN_FORMS[::13]]
    forms += [(form, weight) for weight in WEIGHTS for form in WEIGHED_FORMS[::20]]
    return {
        fill(form, digit, weight): digit
        for form, weight in forms
        for digit in range(Digits.num_classes)
    }


def held_out_prompts() -> dict[str, int]:
    return {fill(HELD_OUT, digit): digit for digit in range(Digits.num_classes)}


PROMPTS = {"seen": seen_prompts, "held_out": held_out_prompts}


# images


def save_images(digits: Digits, captions: list[list[str]], folder: Path) -> None:
    """Write each digit as N.png and its captions as N.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    # 17 levels of grey become as many of the 256
    pixels = ((digits.images[:, 0] + 1) * 127.5).round().to(torch.uint8).numpy()
    for number, (image, lines) in enumerate(zip(pixels, captions, strict=True)):
        Image.fromarray(image).save(folder / f"{number:04d}.png")
        text = "".join(line + "\n" for line in lines)
        (folder / f"{number:04d}.txt").write_text(text, encoding="utf-8")


def save_prompts(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in PROMPTS.items():
        (folder / f"{name}.txt").write_text("".join(prompt + "\n" for prompt in prompts()))


# the text encoder


def make_tokenizer(captions: list[list[str]]):
    """A token for each word of the captions; every other word is ``<unknown>``."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    splitter = pre_tokenizers.Whitespace()
    texts = {text for lines in captions for text in lines}
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, SPECIAL[UNK]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BEGIN]} $A {SPECIAL[END]}",
        special_tokens=[(SPECIAL[number], number) for number in (BEGIN, END)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[BEGIN],
        eos_token=SPECIAL[END],
        pad_token=SPECIAL[PAD],
        unk_token=SPECIAL[UNK],
        model_max_length=TOKENS,
    )


def make_encoder(vocabulary: int):
    """The text part of a CLIP, with its projection."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return CLIPTextModelWithProjection(config)


def make_image_encoder() -> nn.Module:
    """The image part, which only training needs."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
    )


def token_ids(tokenizer, texts: list[str]) -> Tensor:
    """int64 ``[N, TOKENS]``."""
    found = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True)
    return torch.tensor(found["input_ids"])


def similarities(images: Tensor, texts: Tensor) -> Tensor:
    """Cosines ``[N, M]`` of vectors ``[N, D]`` and ``[M, D]``."""
    return F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T


def hidden_words(ids: Tensor, generator: torch.Generator) -> Tensor:
    """Ids of which a share of the words is unknown, so that the encoder learns to do without."""
    hidden = torch.rand(ids.shape, generator=generator) < UNKNOWN
    return ids.masked_fill(hidden & (ids >= len(SPECIAL)), UNK)


def fit(encoder, image_encoder, tokenizer, digits, captions, steps: int, seed: int) -> None:
    """Teach both which caption belongs to which image (CLIP, arXiv 2103.00020)."""
    counts = torch.tensor([len(lines) for lines in captions])
    firsts = counts.cumsum(0) - counts
    ids = token_ids(tokenizer, [text for lines in captions for text in lines])
    log_scale = nn.Parameter(torch.tensor(2.0))
    parameters = [*encoder.parameters(), *image_encoder.parameters(), log_scale]
    optimizer = torch.optim.AdamW(parameters, LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.arange(BATCH)
    for _ in range(steps):
        rows = torch.randint(len(digits), (BATCH,), generator=generator)
        # one of the captions of each
        chosen = (torch.rand(BATCH, generator=generator) * counts[rows]).long()
        words = hidden_words(ids[firsts[rows] + chosen], generator)
        texts = encoder(input_ids=words).text_embeds
        scores = log_scale.exp() * similarities(image_encoder(digits.images[rows]), texts)
        loss = F.cross_entropy(scores, pairs) + F.cross_entropy(scores.T, pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    encoder.eval()


@torch.no_grad()
def found_by_prompt(encoder, image_encoder, tokenizer, prompts: dict[str, int]) -> float:
    """Share of the held-out digits that are most like a prompt of their digit."""
    held_out = Digits(held_out=True)
    texts = encoder(input_ids=token_ids(tokenizer, [*prompts])).text_embeds
    nearest = similarities(image_encoder(held_out.images), texts).argmax(1)
    said = torch.tensor([*prompts.values()])[nearest]
    return (said == held_out.labels).float().mean().item()


def save_encoder(digits, captions, folder: Path, steps: int, seed: int) -> None:
    """Train a text encoder, unless the folder holds the one of the same captions and settings."""
    import transformers

    digest = hashlib.sha256(json.dumps(captions).encode()).hexdigest()
    recipe = {"captions": digest, "width": WIDTH, "tokens": TOKENS, "steps": steps, "seed": seed}
    # written last
    finished = folder / "recipe.json"
    if finished.exists() and read_json(finished) == recipe:
        print(f"{folder}: is there")
        return
    finished.unlink(missing_ok=True)
    # transformers imports DeepSpeed, which would warn that there is no GPU; none is used
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(captions)
    encoder = make_encoder(len(tokenizer))
    image_encoder = make_image_encoder()
    fit(encoder, image_encoder, tokenizer, digits, captions, steps, seed)
    with quiet(transformers.utils.logging):
        tokenizer.save_pretrained(folder)
        encoder.save_pretrained(folder)
    write_json(finished, recipe)
    shares = {
        name: found_by_prompt(encoder, image_encoder, tokenizer, prompts())
        for name, prompts in PROMPTS.items()
    }
    print(
        f"{folder}: {len(tokenizer)} tokens; finds the digit of a held-out image among the captions "
        f"{shares['seen']:.1%}, in other words {shares['held_out']:.1%}"
    )


# commands


def make(folder: Path, steps: int, seed: int) -> None:
    # before anything is written
    import transformers  # noqa: F401

    digits = Digits()
    captions = captions_of(digits)
    save_images(digits, captions, folder / "images")
    save_prompts(folder / "prompts")
    print(f"{folder / 'images'}: {len(digits)} digits with {sum(map(len, captions))} captions")
    save_encoder(digits, captions, folder / "text_encoder", steps, seed)


def read_samples(folder: Path) -> tuple[Tensor, list[str]]:
    """Images ``[N, 1, 8, 8]`` in [-1, 1], and their prompts."""
    # an interrupted sample.py leaves the prompts without the images
    for file in ("prompts.jsonl", "samples.npz"):
        if not (folder / file).is_file():
            raise ValueError(f"expected samples of prompts in {folder}, there is no {file}")
    pixels = np.load(folder / "samples.npz")["arr_0"]
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, [json.loads(line) for line in lines]


def share(right: Tensor) -> float:
    return round(right.double().mean().item(), 4)


def score(run: Path) -> dict:
    """How many samples show the digit that their prompt names, and how many of those that should be
    bold or thin have more or less ink than half of the real ones.

    Raises:
        ValueError: there are no samples, or they are of other prompts.
    """
    scores = {}
    for name, prompts in PROMPTS.items():
        images, texts = read_samples(run / name)
        digit_of = prompts()
        if other := next((text for text in texts if text not in digit_of), None):
            raise ValueError(f"{run / name} must hold samples of {name}.txt, it has {other!r}")
        digits = torch.tensor([digit_of[text] for text in texts])
        scores[f"accuracy_{name}"] = share(read_digits(images) == digits)
        asked = torch.tensor([[weight in text.split() for weight in WEIGHTS] for text in texts])
        if asked.any():
            bolder = ink_of(images) > inks_of_digits([0.5])[digits, 0]
            scores["accuracy_bold_thin"] = share((bolder == asked[:, 0])[asked.any(1)])
    pictures = [str(run / name / "samples.png") for name in PROMPTS]
    return {**scores, "pictures": pictures}


def main() -> None:
    parser = argparse.ArgumentParser(description="Digits with captions in words.")
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write images, captions, text encoder and prompts")
    making.add_argument("folder", type=Path)
    making.add_argument("--steps", type=int, default=400, help="training steps of the encoder")
    making.add_argument("--seed", type=int, default=0, help="of the encoder")
    scoring = commands.add_parser("score", help="read the digits that a run has sampled")
    scoring.add_argument("run", type=Path, help="folder with the samples seen/ and held_out/")
    args = parser.parse_args()
    # rounding depends on the number of threads, and so would the encoder
    torch.set_num_threads(1)
    try:
        if args.command == "make":
            make(args.folder, args.steps, args.seed)
        else:
            print(json.dumps(score(args.run)))
    except ImportError as error:
        extras = "pip install 'sra-fast[train,eval,text]'"
        sys.exit(f"error: {parser.prog} needs {error.name}: {extras}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
