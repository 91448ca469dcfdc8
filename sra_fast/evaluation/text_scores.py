"""How well images fit their prompts, as CLIP sees it: CLIP score and PickScore.

Both are cosines of an image's and its prompt's vectors, from a ``CLIPModel`` of transformers.

- CLIP score: 100 max(cos, 0), the mean over the images. arXiv 2104.08718 has a weight of 2.5 and
  begins every caption with "A photo depicts"; papers on text to image have 100 and no beginning.
- PickScore (arXiv 2305.01569): exp(logit_scale) cos of a CLIP that was trained on what people
  prefer, the mean over the images. Differences of two images of one prompt are logits of which one
  is preferred.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from sra_fast.data.text_encoders import check_tokenizer, load_tokenizer
from sra_fast.data.vae import repeatable, weights_digest
from sra_fast.data.vision import CONFIG, PREPROCESSOR, first_line, quiet, read_preprocessor
from sra_fast.evaluation.folder import FolderImages
from sra_fast.evaluation.npz import NpzImages
from sra_fast.evaluation.packed import PackedImages
from sra_fast.utils.checks import require_that
from sra_fast.utils.files import require

# what Pillow and preprocessor_config.json call bicubic
BICUBIC = 3


@dataclass(frozen=True)
class TextScorer:
    """A CLIP model and what it is to be given.

    Attributes:
        model: transformers' ``CLIPModel``, fp32, in eval mode.
        tokenizer: of transformers.
        size: side of the images it sees.
        scale: a value of 0 .. 255 is multiplied with it before anything else.
        mean, std: of the three channels: an input is (pixel * scale - mean) / std.
        identity: ``path``, ``class`` and ``sha256`` of weights, configuration and vocabulary.
    """

    model: nn.Module
    tokenizer: object
    size: int
    scale: float
    mean: list[float]
    std: list[float]
    identity: dict

    @property
    def tokens(self) -> int:
        """How many a prompt has at most."""
        return self.model.config.text_config.max_position_embeddings

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied by to give logits."""
        return float(self.model.logit_scale.exp())

    def too_long(self, prompts: list[str]) -> list[int]:
        """Numbers of the prompts whose end is not seen."""
        found = self.tokenizer(prompts, padding=False, truncation=False, verbose=False)
        return [i for i, ids in enumerate(found["input_ids"]) if len(ids) > self.tokens]

    @torch.no_grad()
    def cosines(self, images: np.ndarray, prompts: list[str]) -> Tensor:
        """Of each image with its prompt, ``[B]`` fp32 on the CPU.

        Args:
            images: uint8 ``[B, H, W, C]`` of 1 or 3 channels.
            prompts: B of them.
        """
        device = self.model.logit_scale.device
        pixels = torch.stack([self._seen(image) for image in images]).to(device)
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            max_length=self.tokens,
            truncation=True,
            return_tensors="pt",
        )
        with repeatable(tf32=False):
            found = self.model(
                input_ids=tokens["input_ids"].to(device),
                attention_mask=tokens["attention_mask"].to(device),
                pixel_values=pixels,
            )
            return F.cosine_similarity(found.image_embeds, found.text_embeds).float().cpu()

    def _seen(self, image: np.ndarray) -> Tensor:
        """``[3, S, S]``, resized and cropped in the middle as CLIP's own preprocessing does."""
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).convert("RGB")
        width, height = picture.size
        short = min(width, height)
        sides = (self.size * width // short, self.size * height // short)
        if picture.size != sides:
            picture = picture.resize(sides, Image.Resampling.BICUBIC)
        left = (sides[0] - self.size) // 2
        top = (sides[1] - self.size) // 2
        picture = picture.crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() * self.scale
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std


def load_text_scorer(path: str, device: torch.device | str = "cpu") -> TextScorer:
    """The CLIP model in a folder that ``save_pretrained`` wrote, with its tokenizer and
    ``preprocessor_config.json``. Nothing is downloaded, and no code of the folder runs.

    Raises:
        ValueError: transformers is not installed, or the folder holds no CLIPModel, a part of one,
            or none of the other files.
    """
    require("transformers", "transformers", "text")
    import transformers

    folder = Path(path)
    kind = _read_json(folder / CONFIG).get("model_type")
    require_that(kind == "clip", f"{path} must hold a CLIPModel, its model_type is {kind}")
    try:
        with quiet(transformers.utils.logging):
            model, info = transformers.CLIPModel.from_pretrained(
                path, local_files_only=True, output_loading_info=True
            )
    except Exception as error:
        # transformers, safetensors and torch each raise their own types
        raise ValueError(f"{path} holds no readable CLIPModel: {first_line(error)}") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} weights of its CLIPModel, the first is {missing[0]}"
        )
    size = model.config.vision_config.image_size
    _check_preprocessor(folder / PREPROCESSOR, size)
    scale, mean, std = read_preprocessor(folder / PREPROCESSOR)
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, model.config.text_config, "clip", folder)
    model = model.float().eval().requires_grad_(False)
    digest = weights_digest(model.state_dict())
    vocabulary = sorted(tokenizer.get_vocab().items())
    settings = [model.config.vision_config.hidden_act, model.config.text_config.hidden_act]
    digest.update(json.dumps([settings, scale, mean, std, vocabulary]).encode())
    identity = {
        "path": str(folder.absolute()),
        "class": type(model).__name__,
        "sha256": digest.hexdigest(),
    }
    return TextScorer(model.to(device), tokenizer, size, scale, mean, std, identity)


def _read_json(file: Path) -> dict:
    try:
        held = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"a CLIP model needs {file}: {error}") from None
    require_that(isinstance(held, dict), f"{file} must hold an object, it holds something else")
    return held


def _check_preprocessor(file: Path, size: int) -> None:
    """ValueError unless images are resized to what the model sees, bicubic, and cropped."""
    held = _read_json(file)
    for name in ("do_resize", "do_center_crop"):
        done = held.get(name, True)
        require_that(
            done is True,
            f"{file} must have {name} true, for images are resized and cropped in the middle, got "
            f"{done}",
        )
    for name, sides in (("size", ["shortest_edge"]), ("crop_size", ["height", "width"])):
        given = held.get(name, size)
        # a number, or sides by name: others would be another preprocessing
        found = dict.fromkeys(sides, given) if isinstance(given, int) else given
        require_that(
            found == dict.fromkeys(sides, size),
            f"{file} must have {name} {size}, the side that the model sees ({', '.join(sides)}), got "
            f"{given}",
        )
    resample = held.get("resample", BICUBIC)
    require_that(
        resample == BICUBIC, f"{file} must have resample {BICUBIC} (bicubic), got {resample}"
    )


def check_order(images: NpzImages | FolderImages | PackedImages) -> None:
    """ValueError for images that are not read in an order that prompts could have."""
    if isinstance(images, NpzImages):
        return
    files = images.files if isinstance(images, FolderImages) else []
    fault = "packed images"
    if files:
        fault = "several folders" if len({file.parent for file in files}) > 1 else None
        names = [file.name for file in files]
        if names != sorted(names, key=_counted):
            # 10 comes before 9
            fault = fault or "numbers of different lengths in their names"
    require_that(
        fault is None,
        "images of prompts must be those of an .npz, or files of one folder whose names sort in the "
        f"order of the prompts (000.png, 001.png, ..); {images.path} has {fault}",
    )


def _counted(name: str) -> list[str | int]:
    """A key that sorts names by the numbers in them: texts and numbers in turn."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def cosines_of(
    scorers: dict[str, TextScorer],
    images: NpzImages | FolderImages | PackedImages,
    prompts: list[str],
    batch: int,
) -> dict[str, np.ndarray]:
    """Cosines of all images with their prompts, ``[N]`` fp32 for each scorer; one pass over the
    images, with a progress bar.

    Args:
        scorers: by a name.
        images: N of them.
        prompts: N of them.
        batch: images per model call. The last call is filled up, so that all have one shape.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in scorers}
    bar = tqdm(total=images.count, unit="image", desc="prompts")
    with bar:
        for part, said in _with_prompts(images, prompts, batch):
            missing = batch - len(part)
            filled = np.concatenate([part, np.repeat(part[:1], missing, axis=0)])
            texts = said + said[:1] * missing
            for name, scorer in scorers.items():
                found[name].append(scorer.cosines(filled, texts)[: len(part)])
            bar.update(len(part))
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def _with_prompts(
    images: NpzImages | FolderImages | PackedImages, prompts: list[str], batch: int
) -> Iterator[tuple[np.ndarray, list[str]]]:
    first = 0
    for part in images.batches(batch):
        yield part, prompts[first : first + len(part)]
        first += len(part)


def text_scores(cosines: dict[str, np.ndarray], scorers: dict[str, TextScorer]) -> dict[str, float]:
    """The scores of the scorers ``clip_score`` and ``pick_score``, as far as they are there, and the
    mean cosine of the former, ``clip_cosine``.
    """
    scores = {}
    if "clip_score" in cosines:
        values = cosines["clip_score"].astype(np.float64)
        scores["clip_score"] = float(100 * values.clip(min=0).mean())
        scores["clip_cosine"] = float(values.mean())
    if "pick_score" in cosines:
        values = cosines["pick_score"].astype(np.float64)
        scores["pick_score"] = float(scorers["pick_score"].logit_scale * values.mean())
    bad = [name for name, value in scores.items() if not math.isfinite(value)]
    require_that(not bad, f"expected finite scores, {', '.join(bad)} are not: the model's weights")
    return scores
