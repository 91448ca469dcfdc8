"""What the tests do with each command that the documents show: execute it, or only parse it, and why."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from documents import DOCUMENTS, Command, commands_of


@dataclass(frozen=True)
class ParseOnly:
    """A command that is not executed.

    Attributes:
        reason: why not.
    """

    reason: str


@dataclass(frozen=True)
class Execute:
    """A command that is executed in a folder that stands for the checkout.

    Attributes:
        more: arguments behind those of the document, which make it small.
        after: beginnings of the commands whose results it reads; they are executed before it.
        stand_ins: words of the document that are a reader's own, and those of the workspace that
            are taken in their place.
        makes: files that it must leave.
        says: a regular expression that its output must match.
    """

    more: str = ""
    after: tuple[str, ...] = ()
    stand_ins: dict[str, str] = field(default_factory=dict)
    makes: tuple[str, ...] = ()
    says: str = ""


DEMO = "deepspeed sra_fast/train.py --config configs/digits.yaml"
TINY_RUN = (
    "--model.hidden_size 32 --model.depth 4 --model.num_heads 2 --align.student_layer 2 "
    "--align.teacher_layer 3 --train.global_batch 16 --train.steps 4 --train.log_every 2 --sample.steps 2"
)
SAMPLES = "python sra_fast/sample.py --checkpoint runs/digits/000"
WRITTEN = "python sra_fast/evaluate.py --reference real_images"
PUBLISHED = "sra-fast export --checkpoint RUN --out published.pt"
IMPORT_SIT = "sra-fast import-weights --from SiT-XL-2-256x256.pt"
IMPORT_DIT = "sra-fast import-weights --from DiT-XL-2-256x256.pt"
PIPELINE = "sra-fast export --checkpoint RUN --format diffusers"
OWN = "sra-fast preprocess --source my_images"
OWN_RUN = "sra-fast train --model SiT-S/4 --data data/mine"
OWN_LATENTS = f"{OWN} --out data/latents"
SMALL = "--model.hidden_size 32 --model.depth 4 --model.num_heads 2 --train.global_batch 8 --train.steps 2"
DIGITS_FEATURES = "python examples/digits_features.py"
PHOTOS = "python examples/photos.py"
PHOTO_PIXELS = "python sra_fast/preprocess.py --source data/photos/images"
PHOTO_RUN = "deepspeed sra_fast/train.py --config configs/photos.yaml"
PHOTO_SAMPLES = "python sra_fast/sample.py --checkpoint runs/photos/000"
IMAGENET = ParseOnly("needs ImageNet's latents and a GPU for days")
INCEPTION = ParseOnly("needs Inception's weights")
CLIP = ParseOnly("needs published CLIP models; tests/evaluation/test_text_scores.py has small ones")
PROMPTS = ParseOnly("needs a model of text; tests/sampling/test_prompts.py has a small one")
EXAMPLE = ParseOnly("takes two minutes as a whole; tests/test_captions_example.py has its parts")
COCO = ParseOnly("needs MS-COCO, and to train a GPU for days")
CAPTIONS = ParseOnly("needs published text encoders; tests/data has small ones")
FEATURES = ParseOnly(
    "needs a published vision model; tests/data/test_stored_features.py has small ones"
)
CHECKPOINT = ParseOnly("needs a published checkpoint and its VAE; tests/sampling has both, small")
BENCHMARK = ParseOnly("measures for minutes; tests/benchmarks has its parts")
MAKE = ParseOnly("is how these tests, and the rest of .ci/run, are started")
PIP = ParseOnly("installs from a package index; tests/test_import.py builds and installs")

# beginning of a command -> what is done with it; the longest that fits counts
CLASSES = {
    "make": MAKE,
    "pip install": PIP,
    "SRA_FAST_BUILD_EXT=1 pip install": PIP,
    'python -c "import sra_fast': Execute(says="configs$"),
    DEMO: Execute(TINY_RUN, makes=("runs/digits/000/ema.safetensors", "runs/digits/000/loss.png")),
    "deepspeed sra_fast/train.py --config configs/sit_xl2_256.yaml": IMAGENET,
    "deepspeed sra_fast/train.py --config configs/alignment/": IMAGENET,
    "python examples/captions.py": EXAMPLE,
    "python sra_fast/preprocess.py --source data/captions/images": EXAMPLE,
    "python sra_fast/train.py --config configs/captions.yaml": EXAMPLE,
    "deepspeed sra_fast/train.py --config configs/mmdit_coco_256.yaml": COCO,
    "sra-fast preprocess --source coco256_features": COCO,
    "python sra_fast/preprocess.py --source coco/val2014": COCO,
    "sra-fast preprocess --source my_images --out data/mine --captions": CAPTIONS,
    "sra-fast preprocess --source my_images --out data/mine --vae sd-vae-ft-mse --resolution 256 "
    "--captions": CAPTIONS,
    "python sra_fast/train.py --config configs/digits.yaml --align": Execute(
        f"{TINY_RUN} --train.out runs/self_flow", makes=("runs/self_flow/000/ema.safetensors",)
    ),
    "deepspeed --num_gpus 8 sra_fast/train.py --config configs/dit_b2_256.yaml": IMAGENET,
    "deepspeed sra_fast/preprocess.py --source imagenet/train": IMAGENET,
    "python sra_fast/preprocess.py --source data/imagenet256": IMAGENET,
    SAMPLES: Execute(
        "--sample.steps 2 --batch 50",
        (DEMO,),
        makes=("samples/samples.npz", "samples/samples.png"),
    ),
    "python sra_fast/sample.py --checkpoint step-400000.pt": CHECKPOINT,
    "deepspeed --num_gpus 8 sra_fast/sample.py --checkpoint runs": IMAGENET,
    "python sra_fast/evaluate.py --samples": INCEPTION,
    "python sra_fast/evaluate.py --samples samples --clip_score": CLIP,
    "python sra_fast/evaluate.py --samples my_images --prompts": CLIP,
    "python sra_fast/sample.py --checkpoint runs/captions/000": PROMPTS,
    "python sra_fast/evaluate.py --samples samples --reference real_images": Execute(
        "--out pixels.json", (SAMPLES,), makes=("pixels.json",), says="^fid "
    ),
    WRITTEN: Execute(
        stand_ins={"--inception": "--features", "WEIGHTS.pth": "pixels"},
        makes=("real.npz",),
        says="written: real.npz, the statistics of 100 images",
    ),
    "python sra_fast/evaluate.py --samples samples --reference real.npz": Execute(
        "--out own.json",
        (SAMPLES, WRITTEN),
        {"--inception": "--features", "WEIGHTS.pth": "pixels"},
        makes=("own.json",),
        says="^fid .*not written by the ADM suite",
    ),
    "python sra_fast/evaluate.py --samples samples.npz --reference real.npz": Execute(
        "--out features.json",
        (SAMPLES,),
        {"samples.npz": "samples/samples.npz", "real.npz": "real_images"},
        makes=("features.json",),
        says="extractor: my_features.extract",
    ),
    "python sra_fast/probe.py --checkpoint runs/digits/000": ParseOnly(
        "fits classifiers for a minute; tests/analysis does it"
    ),
    "python sra_fast/probe.py --checkpoint runs/sit_xl/000": IMAGENET,
    "python sra_fast/visualize.py --checkpoint runs/digits/000": Execute(
        "--images 2 --times [0.5]", (DEMO,), makes=("analysis/pca.png",)
    ),
    "python sra_fast/visualize.py --runs": Execute(
        after=(DEMO, OWN_RUN),
        stand_ins={"[runs/sra/000, runs/plain/000]": "[runs/digits/000, runs/default/000]"},
        makes=("analysis/curves.png",),
    ),
    "python sra_fast/visualize.py --samples": Execute(
        after=(SAMPLES,),
        stand_ins={"[samples_sra, samples_plain]": "[samples, samples/samples.npz]"},
        makes=("analysis/samples.png",),
    ),
    "python sra_fast/held_out.py --checkpoint runs/sra/000": Execute(
        "--images 20",
        (DEMO,),
        {"runs/sra/000": "runs/digits/000"},
        makes=("sra.npz",),
        says="^held-out loss",
    ),
    "python sra_fast/held_out.py --checkpoint runs/plain/000": Execute(
        "--images 20",
        ("python sra_fast/held_out.py --checkpoint runs/sra/000",),
        {"runs/plain/000": "runs/digits/000"},
        says="^minus sra.npz: [+]0.00000",
    ),
    "python sra_fast/ablate.py configs/ablations/": ParseOnly("trains for an hour"),
    "python examples/bad_to_good.py": ParseOnly(
        "reads runs of a study; tests/analysis/test_bad_to_good.py makes small ones"
    ),
    DIGITS_FEATURES: Execute(
        "--steps 2 --width 16 --depth 1",
        makes=("data/digits/packed/features/vit/index.json",),
        says="of the held-out digits",
    ),
    "python sra_fast/import_weights.py --from SiT-XL-2-256x256.pt": Execute(
        "--num_heads 2", says=r"\.safetensors$"
    ),
    "python sra_fast/train.py ARGS": ParseOnly("stands for every command of the program"),
    "sra-fast train ARGS": ParseOnly("stands for every command of the program"),
    "sra-fast --help": Execute(says="commands:"),
    "sra-fast export --checkpoint runs/sit_xl/000": Execute(
        after=(DEMO,),
        stand_ins={
            "runs/sit_xl/000/checkpoints/step_00050000": "runs/digits/000/checkpoints/step_00000004"
        },
        makes=("step50000.safetensors",),
    ),
    # from a folder to samples
    OWN: Execute(
        "--resolution 16", makes=("data/mine/index.json", "data/mine/held_out/index.json")
    ),
    OWN_RUN: Execute(
        f"{SMALL} --train.precision fp32 --data.num_workers 0",
        (OWN,),
        makes=("runs/default/000/ema.safetensors",),
    ),
    OWN_LATENTS: Execute(
        "--resolution 64", stand_ins={"VAE_FOLDER": "vae"}, makes=("data/latents/index.json",)
    ),
    "sra-fast train --model SiT-S/2 --data data/latents": Execute(
        f"{SMALL} --train.precision fp32 --data.num_workers 0 --train.out runs/latents",
        (OWN_LATENTS,),
        makes=("runs/latents/000/ema.safetensors",),
    ),
    "python sra_fast/train.py --model SiT-S/4 --data data/mine": ParseOnly(
        "README.md's command under another name"
    ),
    "sra-fast preprocess --source data/mine --features": FEATURES,
    # with the digits and a vision model of theirs, whose features lie as those of other data do
    f"{OWN_RUN} --align cached_features": Execute(
        f"{SMALL} --model.patch_size 2 --train.precision fp32 --data.num_workers 0 "
        "--train.out runs/features",
        (DIGITS_FEATURES,),
        {"data/mine": "data/digits/packed", "dinov2-small": "vit"},
        makes=("runs/features/000/ema.safetensors",),
    ),
    "sra-fast sample --checkpoint runs/default/000": Execute(
        "--count 4 --sample.steps 2 --sample.method euler --out own",
        (OWN_RUN,),
        makes=("own/samples.npz",),
    ),
    PHOTOS: Execute(makes=("data/photos/images/val/temple/079.jpg",)),
    PHOTO_PIXELS: Execute("--resolution 16", (PHOTOS,), says="1600 images of 5 classes"),
    PHOTO_RUN: Execute(
        f"{SMALL} --train.log_every 1",
        (PHOTO_PIXELS,),
        makes=("runs/photos/000/ema.safetensors",),
    ),
    PHOTO_SAMPLES: Execute(
        "--count 20 --sample.steps 2",
        (PHOTO_RUN,),
        makes=("runs/photos/000/generated/samples.png",),
    ),
    "python sra_fast/evaluate.py --samples runs/photos/000/generated": Execute(
        after=(PHOTO_SAMPLES,), makes=("runs/photos/000/scores.json",), says="fid"
    ),
    "python sra_fast/probe.py --checkpoint runs/photos/000": Execute(
        "--images 40 --draws 1 --times [0.5] --layers [2]",
        (PHOTO_RUN,),
        makes=("runs/photos/000/probe/probe.json",),
        says="best: block 2",
    ),
    # other launchers; tests/training compares what they train
    "python sra_fast/train.py --config configs/digits.yaml": Execute(
        f"{TINY_RUN} --train.out runs/alone", makes=("runs/alone/000/ema.safetensors",)
    ),
    "python sra_fast/train.py --config configs/digits.yaml --train.seed": ParseOnly(
        "trains six networks"
    ),
    "python sra_fast/train.py --config configs/digits.yaml --train.loggers": ParseOnly(
        "tests/training/test_loggers.py runs every logger, wandb offline"
    ),
    "deepspeed --quiet --num_gpus 8 sra_fast/train.py": IMAGENET,
    "torchrun": IMAGENET,
    "accelerate launch": IMAGENET,
    # weights from anywhere, to anywhere
    "sra-fast export --checkpoint SOURCE --out w.safetensors": Execute(
        after=(DEMO,),
        stand_ins={"SOURCE": "runs/digits/000", "w.safetensors": "exported.safetensors"},
        makes=("exported.safetensors",),
    ),
    "sra-fast export --checkpoint SOURCE --out FOLDER --push": ParseOnly(
        "uploads to the hub; tests/checkpoint does it with a hub of its own"
    ),
    "sra-fast export --checkpoint SOURCE --out FOLDER --format diffusers": Execute(
        after=(IMPORT_DIT,),
        stand_ins={"SOURCE": "dit_xl2.safetensors", "FOLDER": "exported", "VAE_FOLDER": "vae"},
        makes=("exported/model_index.json", "exported/vae/config.json"),
    ),
    "sra-fast export --checkpoint published.pt": Execute(
        after=(PUBLISHED,),
        makes=("other.pt",),
    ),
    PIPELINE: Execute(
        after=(IMPORT_DIT,),
        stand_ins={"RUN": "dit_xl2.safetensors", "VAE_FOLDER": "vae"},
        makes=("pipeline/model_index.json", "pipeline/transformer/config.json"),
    ),
    "sra-fast import-weights --from pipeline": Execute(after=(PIPELINE,), makes=("w.safetensors",)),
    IMPORT_SIT: Execute("--num_heads 2", makes=("sit_xl2.safetensors",)),
    IMPORT_DIT: Execute("--num_heads 2", makes=("dit_xl2.safetensors",)),
    "sra-fast import-weights --from sd3_medium.safetensors": ParseOnly(
        "tests/checkpoint/test_sd3.py imports such a file"
    ),
    "sra-fast train --config mine.yaml --train.resume auto": ParseOnly(
        "tests/scripts/test_resume.py resumes runs"
    ),
    PUBLISHED: Execute(
        after=(DEMO,),
        stand_ins={"RUN": "runs/digits/000"},
        makes=("published.pt",),
    ),
    "deepspeed sra_fast/train.py --config mine.yaml": Execute(
        f"{TINY_RUN} --train.out runs/tuned",
        (IMPORT_SIT,),
        makes=("runs/tuned/000/ema.safetensors",),
    ),
    "python sra_fast/probe.py --checkpoint DIR": ParseOnly("probes those six networks"),
    "python sra_fast/import_weights.py --from DiT-XL-2-256x256.pt": Execute(
        "--num_heads 2", makes=("dit.safetensors",)
    ),
    "python sra_fast/preprocess.py --source imagenet/train": IMAGENET,
    "python sra_fast/sample.py --checkpoint runs/mine/000 --sample.weights power": ParseOnly(
        "tests/checkpoint/test_average_snapshots.py samples from such averages"
    ),
    "python sra_fast/sample.py --checkpoint runs/xl2/000": Execute(
        # the digits have one channel
        "--count 4 --sample.steps 2 --sample.guided_channels 1 --out xl2",
        (DEMO,),
        {"runs/xl2/000": "runs/digits/000"},
        makes=("xl2/samples.npz",),
    ),
    "python -m benchmarks.": BENCHMARK,
    "python tests/planted_bugs.py": ParseOnly("takes half an hour"),
}

COMMANDS = [command for path in DOCUMENTS for command in commands_of(path)]


def key_of(command: Command) -> str | None:
    """The beginning in ``CLASSES`` that the command has."""
    return max((key for key in CLASSES if command.text.startswith(key)), key=len, default=None)


def executed() -> Iterator[Command]:
    """The commands to execute, the same text once."""
    seen = set()
    for command in COMMANDS:
        key = key_of(command)
        if key and isinstance(CLASSES[key], Execute) and command.text not in seen:
            seen.add(command.text)
            yield command
