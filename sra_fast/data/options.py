"""The options of preprocess.py."""

from dataclasses import dataclass, fields
from typing import Literal

from sra_fast.utils.checks import require_that


@dataclass
class Options:
    """What to make of what. Interrupted, the same command resumes, on any number of processes."""

    source: str
    """images: a folder or .zip (class folders, train/ and val/, a dataset.json, or no classes),
    WebDataset tars (one, a folder, or name-{000..010}.tar), a Hugging Face data set (a saved folder,
    or hf:NAME), a folder of MNIST's files (train-images-idx3-ubyte.gz, ...), or an .npz (arr_0 uint8
    [N, H, W, C], arr_1 labels); moments: a folder with vae-sd/ or index.json; packed pixels, to add
    features to them; MS-COCO as U-ViT's scripts leave it (train/0.npy, train/0_0.npy, ...,
    empty_context.npy): latents with text features"""
    out: str | None = None
    """folder to make; with `bad list` nothing is written, and features of packed pixels lie in
    SOURCE"""
    vae: str | None = None
    """folder of a diffusers AutoencoderKL: images become its moments"""
    pixels: bool = False
    """keep the images themselves, in uint8, for models without a VAE"""
    features: str | None = None
    """folder of a transformers vision model (DINOv2, DINOv3, ViT, CLIP, SigLIP): its features of
    every patch, in OUT/features, beside the latents or pixels of the same command or of an earlier
    one"""
    features_name: str | None = None
    """the features are in OUT/features/NAME; default: the name of the model's folder"""
    features_grid: int | None = None
    """patches per side; images are resized for that. Default: half the side of the latents or
    pixels, the tokens of a model with patches of 2"""
    features_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """of the shards of features"""
    captions: list[str] | None = None
    """captions of the images: txt (a .txt beside each image, a caption a line; in tars also the
    sample's .json), JSON files (COCO's, or {file: caption or captions}), or a column of a Hugging Face
    data set. Their features go to OUT/text, beside the latents or pixels of the same command or of an
    earlier one"""
    text_encoders: list[str] | None = None
    """folders of text encoders of transformers: CLIP or T5; several, such as CLIP, CLIP and T5, are
    joined as in Stable Diffusion 3"""
    text_name: str | None = None
    """the text features are in OUT/text/NAME; default: the names of the encoders' folders"""
    text_tokens: int | None = None
    """how many tokens T5 sees of a caption, or CLIP without T5; default: 256, and CLIP's 77"""
    text_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """of the shards of text features"""
    layout: Literal["packed", "published"] = "packed"
    """what to write: shards, or the published code's vae-sd/**/*.npy and vae-sd/dataset.json"""
    resolution: int | None = None
    """side of the images' centre crop; default: 256 with a VAE, 64 for pixels, and for arrays (.npz,
    MNIST's files) their own"""
    channels: int = 3
    """of pixels: 1 (grey), 3 or 4 (with alpha); arrays keep their own"""
    num_classes: int | None = None
    """how many classes there must be; default: as many as there are"""
    holdout: float = 0.0
    """share of every class, at least one image, that is held out: OUT/held_out is then a data set of
    its own"""
    mirror: bool = False
    """add the mirror image of every training image"""
    background: str = "white"
    """colour under transparent pixels: a name or #rrggbb"""
    orientation: bool = False
    """rotate images as their EXIF orientation says (ImageNet's were ignored by all published work)"""
    bad: Literal["stop", "skip", "list"] = "stop"
    """an image that cannot be read: stops the command, is left out and counted, or is listed, without
    making anything"""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """of the shards of moments; float16 is eight times as fine as bfloat16"""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """of the encoder, of the vision model and of the text encoders"""
    shard_size: int = 8192
    """images per shard, and the most that a restart makes again; captions: at most a gigabyte"""
    batch: int = 64
    """images or captions per call of an encoder or the vision model"""
    threads: int = 8
    """threads per process that read, decode and crop"""


# how images are read: an index keeps these under their names
READ_AS = ("resolution", "mirror", "background", "orientation", "bad", "holdout", "num_classes")
# options of a source of images, and those of the decoding of their files
DECODING_OPTIONS = ("channels", "background", "orientation", "bad")
CAPTION_OPTIONS = ("captions", "text_encoders")
SOURCE_OPTIONS = (
    *("vae", "pixels", "mirror", "holdout", "resolution"),
    *CAPTION_OPTIONS,
    *DECODING_OPTIONS,
)
IMAGE_OPTIONS = ("features", "precision", *SOURCE_OPTIONS)
# how a vision model is used
FEATURE_OPTIONS = ("features_name", "features_grid", "features_dtype")
# how captions are stored, and what text encoders need for it
TEXT_OPTIONS = ("text_name", "text_dtype")
ENCODER_OPTIONS = ("text_encoders", "text_tokens")


def default(name: str):
    """The default of an option."""
    (field,) = (field for field in fields(Options) if field.name == name)
    return field.default


def refuse(options: Options, names: tuple[str, ...], are: str, source_is: str) -> None:
    """ValueError for options that were given and would have no effect on this source."""
    for name in names:
        require_that(
            getattr(options, name) == default(name),
            f"--{name} {are}, {options.source} {source_is}",
        )
