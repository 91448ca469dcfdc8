"""A Hugging Face model folder: config.json, model.safetensors and a model card; and its upload."""

import hashlib
import json
from pathlib import Path

import yaml

import sra_fast
from sra_fast.checkpoint.export import config_of, write_loaded
from sra_fast.checkpoint.load_model import LoadedModel, has_run
from sra_fast.checkpoint.reading import SCORES, SUMMARY
from sra_fast.checkpoint.sources import LIBRARY, MODEL_FILE, run_of
from sra_fast.models import arguments_of
from sra_fast.utils.checks import require_that
from sra_fast.utils.files import plain, require, sha256, write_json
from sra_fast.utils.messages import warn
from sra_fast.utils.outputs import whole_folder
from sra_fast.utils.yaml_loader import write_config

CARD = "README.md"
CONFIG = "config.json"
# in it: the SHA-256 of the card that was written with it
CARD_DIGEST = "card_sha256"
# of a run's summary: no scores
NOT_SCORES = ("images_per_s", "step")
# how the card calls weights: LoadedModel.weights -> text
WEIGHTS = {"ema": "the EMA of the weights", "model": "the student's weights", None: "the weights"}
AVERAGE = "the average {name} of the weights"
# what a network makes images from -> the hub's name of it
TASKS = {"labels": "image-generation", "text": "text-to-image"}
# sections of the configuration that say how the weights were made
TRAINED_WITH = ("align", "diffusion", "optim")


def write_folder(loaded: LoadedModel, out: Path, name: str | None = None) -> None:
    """Write a model folder, which ``load_model`` and ``train.init_from`` take.

    A card that somebody has edited, or written, is kept; a warning says so.

    Args:
        loaded: the weights.
        out: the folder; made if it is not there.
        name: USER/NAME on the hub, for the card; default: the folder's name.

    Raises:
        ValueError: the folder cannot be made.
        OSError: a file cannot be written.
    """
    text = card(loaded, name or out.absolute().name)
    digest = hashlib.sha256(text.encode()).hexdigest()
    is_own = not (out / CARD).exists() or sha256(out / CARD) == _digest_of_card(out)
    held = {
        "library_name": LIBRARY,
        "library_version": sra_fast.__version__,
        "architectures": [loaded.model.family],
        "arguments": arguments_of(loaded.model),
        "config": config_of(loaded),
        "step": loaded.step,
        "weights": loaded.weights,
        "data": loaded.facts.as_json() if loaded.facts else None,
        CARD_DIGEST: digest if is_own else None,
    }
    with whole_folder(out) as folder:
        write_loaded(loaded, folder / MODEL_FILE)
        write_json(folder / CONFIG, held)
        if is_own:
            (folder / CARD).write_text(text, encoding="utf-8")
    if not is_own:
        warn(
            "%s is kept as it is, it is no card that an export has written: remove it to get one of "
            "these weights",
            out / CARD,
        )


def _digest_of_card(folder: Path) -> str | None:
    """The SHA-256 of the card that was written into a folder, as far as the folder says it."""
    try:
        return json.loads((folder / CONFIG).read_text())[CARD_DIGEST]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def card(loaded: LoadedModel, name: str) -> str:
    """The model card, Markdown with YAML in front."""
    model = loaded.model
    front = {
        "library_name": LIBRARY,
        "tags": ["diffusion", model.family.lower(), TASKS[model.conditioning]],
    }
    count = sum(p.numel() for n, p in model.named_parameters() if n not in loaded.fresh)
    made = f" after {loaded.step} optimizer steps" if loaded.step is not None else ""
    which = WEIGHTS.get(loaded.weights, AVERAGE.format(name=loaded.weights))
    # weights of any origin can be written in this form
    is_run = has_run(loaded.config)
    origin = "trained with [sra-fast]" if is_run else "as [sra-fast] reads it"
    article = "An" if model.family.startswith("M") else "A"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {name}\n",
        f"{article} {model.family} of {count:,} parameters, {origin}: {which}{made}, in fp32.\n",
        "## Sample\n",
        _how_to_sample(loaded, name),
        "## Network\n",
        _table(arguments_of(model)),
    ]
    if loaded.facts is not None:
        parts += ["## Data\n", _table(_facts_shown(loaded))]
    if is_run:
        sections = {key: loaded.config[key] for key in TRAINED_WITH if key in loaded.config}
        settings = write_config(plain(sections))
        parts += ["## Training\n", f"```yaml\n{settings}```\n"]
    scores = _scores(loaded)
    if scores:
        parts += ["## Scores\n", _table(scores)]
    parts.append("[sra-fast]: https://arxiv.org/abs/2505.02831\n")
    return "\n".join(parts)


def _how_to_sample(loaded: LoadedModel, name: str) -> str:
    facts = loaded.facts
    is_latent = loaded.model.in_channels not in (1, 3) if facts is None else not facts.pixels
    decoder = " --vae AUTOENCODER" if is_latent and loaded.model.in_channels not in (1, 3) else ""
    if "/" in name:
        folder = name.rpartition("/")[2]
        first = f"    hf download {name} --local-dir {folder}\n"
    else:
        folder, first = name, ""
    what = "--count 100"
    if loaded.model.conditioning == "text":
        what = "--prompts prompts.txt --text_encoders FOLDER"
    return f"{first}    sra-fast sample --checkpoint {folder} {what} --out samples{decoder}\n"


def _facts_shown(loaded: LoadedModel) -> dict:
    """The facts about the data, without folders of the machine that trained."""
    facts = loaded.facts
    assert facts is not None
    held = facts.as_json()
    shown = {key: held[key] for key in ("name", "shape", "num_classes", "pixels", "scale", "shift")}
    text = facts.text
    if text is not None:
        # captions are no classes
        del shown["num_classes"]
        shown["captions"] = text["name"]
        if "tokens" in text:
            shown["captions"] += f": {text['tokens']} tokens of {text['width']}"
        for i, encoder in enumerate(text.get("encoders") or [], start=1):
            key = "text encoder" if i == 1 else f"text encoder {i}"
            shown[key] = f"{encoder['class']}, sha256 {encoder['sha256']}"
    if facts.class_names:
        shown["class names"] = ", ".join(facts.class_names)
    return shown


def _scores(loaded: LoadedModel) -> dict:
    """Numbers of the run folder's ``summary.json`` and ``scores.json``, as far as those say that
    they are of these weights: ``step`` and ``weights``.
    """
    run = run_of(loaded.source) if loaded.source is not None else None
    if run is None:
        return {}
    scores = {}
    for file in (SUMMARY, SCORES):
        try:
            held = json.loads((run / file).read_text())
        except (OSError, ValueError):
            continue
        made_of = (held.get("step"), held.get("weights"))
        if None in made_of or made_of != (loaded.step, loaded.weights):
            continue
        verdicts = held.get("comparable", {})
        for key, value in held.items():
            if isinstance(value, float | int) and key not in NOT_SCORES:
                remark = f" ({verdicts[key]})" if key in verdicts else ""
                scores[key] = f"{value:.6g}{remark}"
    return scores


def _table(rows: dict) -> str:
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines, ""])


def check_push(name: str) -> None:
    """ValueError unless ``name`` can be a repository of the hub and its library is installed."""
    user, _, repository = name.partition("/")
    require_that(
        bool(user and repository) and "/" not in repository,
        f"push expects USER/NAME, got {name}",
    )
    require("huggingface_hub", "huggingface_hub", "hub")


def push(folder: Path, name: str) -> None:
    """Upload a folder to the repository ``USER/NAME`` of the Hugging Face hub, made if needed.

    Raises:
        ValueError: there is no network, nobody is logged in, or the hub refuses. The folder stays.
    """
    check_push(name)
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(name, repo_type="model", exist_ok=True)
        api.upload_folder(
            folder_path=str(folder), repo_id=name, repo_type="model", ignore_patterns=[".*", "*/.*"]
        )
    except Exception as error:
        # the hub's library, its client and the network each raise their own types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{folder} is written, and could not be uploaded to {name}: {reason} "
            "(this needs a network and `hf auth login`, or HF_TOKEN)"
        ) from None
