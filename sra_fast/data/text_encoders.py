"""Text encoders of transformers, loaded from local folders: prompts to features.

One encoder alone gives its last hidden states. Several are joined as Stable Diffusion 3 joins them
(arXiv 2403.03206): of every CLIP the hidden states before its last layer, side by side along the
channels; T5's last hidden states after them along the sequence; the narrower ones padded with zeros
to the widest; CLIP's pooled vectors, projected if the folder has the projection, side by side. T5
alone comes with a mask of its tokens; in Stable Diffusion 3 neither T5 nor the transformer has one,
so there is none for several.
"""

import json
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sra_fast.data.reasons import why
from sra_fast.data.vae import repeatable, weights_digest
from sra_fast.data.vision import first_line, quiet
from sra_fast.models import TextFeatures
from sra_fast.utils.checks import require_that
from sra_fast.utils.files import require

CONFIG = "config.json"
# one of these is in the folder of every tokenizer
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "spiece.model")
# in a diffusers pipeline, text_encoder_2 has its tokenizer in tokenizer_2
ENCODER_FOLDER = "text_encoder"
TOKENIZER_FOLDER = "tokenizer"
# tokens of a prompt that T5 is given, if nothing else is asked for: Stable Diffusion 3's
T5_TOKENS = 256
# begin, end and one of the prompt's own
FEWEST = 3
# entries of a configuration that decide the features, besides the shapes of the weights
DECISIVE = {
    "clip": ("hidden_act", "layer_norm_eps", "num_attention_heads", "eos_token_id"),
    "t5": (
        "num_heads",
        "dense_act_fn",
        "is_gated_act",
        "layer_norm_epsilon",
        "relative_attention_num_buckets",
        "relative_attention_max_distance",
    ),
}
# what config.json calls them
FAMILIES = {"clip": "clip", "clip_text_model": "clip", "t5": "t5"}


@dataclass(frozen=True)
class Encoder:
    """One text encoder.

    Attributes:
        model: from token ids to hidden states, fp32, in eval mode.
        tokenizer: of transformers.
        family: ``clip`` or ``t5``.
        tokens: how many a prompt is padded or cut to.
        width: of a hidden state.
        pooled: length of the pooled vector; 0: there is none.
        identity: ``class``, ``sha256`` of weights, configuration and vocabulary, ``tokens``,
            ``width`` and ``pooled``.
    """

    model: nn.Module
    tokenizer: object
    family: str
    tokens: int
    width: int
    pooled: int
    identity: dict


class TextEncoders:
    """One or several encoders that see the same prompts.

    Args:
        encoders: in the order of the folders.
        paths: their folders.

    Attributes:
        tokens, width, pooled: L, E and P of ``encode``; P is 0 without a pooled vector.
        masked: whether there is a mask.
        identity: of every encoder, with ``layer``: which hidden states are taken, ``last`` or
            ``penultimate``.
        paths: absolute, of the folders.
    """

    def __init__(self, encoders: list[Encoder], paths: list[str]):
        self.encoders = encoders
        self.paths = [str(Path(path).absolute()) for path in paths]
        clips = [encoder for encoder in encoders if encoder.family == "clip"]
        others = [encoder for encoder in encoders if encoder.family == "t5"]
        self.joined = len(encoders) > 1
        # clips lie side by side, so they have one length
        self.tokens = sum(encoder.tokens for encoder in (*clips[:1], *others))
        widths = [encoder.width for encoder in others]
        self.width = max(sum(encoder.width for encoder in clips), *widths, 0)
        self.pooled = sum(encoder.pooled for encoder in encoders)
        self.masked = bool(others) and not self.joined
        self.identity = [
            {**encoder.identity, "layer": "penultimate" if self._before_last(encoder) else "last"}
            for encoder in encoders
        ]
        self.device = torch.device("cpu")
        self.precision = "fp32"
        # a tokenizer of Rust must not be set up by two threads at once
        self._tokenizing = threading.Lock()

    def _before_last(self, encoder: Encoder) -> bool:
        """Whether the hidden states before an encoder's last layer are taken."""
        return self.joined and encoder.family == "clip"

    def to(self, device: torch.device | str, precision: str = "fp32") -> "TextEncoders":
        """Move the models; returns itself.

        Args:
            device: where ``encode`` runs.
            precision: ``fp32``; ``tf32``: fp32 tensors, products rounded to TF32 on a GPU;
                ``bf16``: autocast.
        """
        self.device = torch.device(device)
        self.precision = precision
        for encoder in self.encoders:
            encoder.model.to(self.device)
        return self

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, list[int]]:
        """Prompts as token ids. Thread-safe.

        Returns:
            int64 ``[B, S]``, the ids of every encoder one after the other, and the numbers of the
            prompts that are too long: their end is seen by no encoder.
        """
        if not prompts:
            return torch.empty(0, sum(e.tokens for e in self.encoders), dtype=torch.int64), []
        ids = []
        cut = set(range(len(prompts)))
        with self._tokenizing:
            for encoder in self.encoders:
                found, lengths = _tokenized(encoder, prompts)
                ids.append(found)
                cut &= {i for i, length in enumerate(lengths) if length > encoder.tokens}
        return torch.cat(ids, 1), sorted(cut)

    @torch.no_grad()
    def encode(self, ids: Tensor) -> TextFeatures:
        """Features of prompts. The same batch always gives the same bits.

        Args:
            ids: ``[B, S]`` of ``tokenize``, on any device.

        Returns:
            Tokens ``[B, L, E]``, pooled ``[B, P]`` or None, and mask ``[B, L]`` or None, fp32 on
            the encoders' device.
        """
        parts = ids.to(self.device).split([encoder.tokens for encoder in self.encoders], 1)
        clips = []
        others = []
        pooled = []
        mask = None
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision == "bf16"
        )
        with repeatable(tf32=self.precision == "tf32"), autocast:
            for encoder, part in zip(self.encoders, parts, strict=True):
                if encoder.family == "t5":
                    mask = part != encoder.tokenizer.pad_token_id if self.masked else None
                    states = encoder.model(input_ids=part, attention_mask=mask).last_hidden_state
                    others.append(states.float())
                    continue
                before_last = self._before_last(encoder)
                output = encoder.model(input_ids=part, output_hidden_states=before_last)
                states = output.hidden_states[-2] if before_last else output.last_hidden_state
                clips.append(states.float())
                vector = getattr(output, "text_embeds", None)
                pooled.append((output.pooler_output if vector is None else vector).float())
        sequences = [torch.cat(clips, 2)] if clips else []
        sequences += others
        tokens = torch.cat([F.pad(s, (0, self.width - s.shape[2])) for s in sequences], 1)
        return TextFeatures(tokens, torch.cat(pooled, 1) if pooled else None, mask, None, None)


def _tokenized(encoder: Encoder, prompts: list[str]) -> tuple[Tensor, list[int]]:
    """Ids int64 ``[B, encoder.tokens]``, and how many there would be without a limit."""
    tokenizer = encoder.tokenizer
    found = tokenizer(prompts, padding="max_length", max_length=encoder.tokens, truncation=True)
    whole = tokenizer(prompts, padding=False, truncation=False, verbose=False)
    return torch.tensor(found["input_ids"]), [len(ids) for ids in whole["input_ids"]]


def load_text_encoders(
    paths: list[str], tokens: int | None = None, kinds: list[str] | None = None
) -> TextEncoders:
    """The text encoders in folders that ``save_pretrained`` wrote, on the CPU.

    Nothing is downloaded, and no code of the folders runs. A folder holds CLIP (its text part,
    with or without the projection, or the whole model) or T5 (the encoder, or the whole model),
    and its tokenizer. For ``text_encoder_2`` of a diffusers pipeline the tokenizer is read from
    ``tokenizer_2`` next to it.

    Args:
        paths: the folders.
        tokens: how many a prompt has: of T5 if there is one, else of CLIP. Default: 256 for T5, as
            many as it can for CLIP (77).
        kinds: their classes, where it is known as what they were loaded before: whole CLIPs that
            were joined by an older version have the vector before the projection.

    Raises:
        ValueError: transformers is not installed, a folder holds no such encoder, parts of one, or
            no tokenizer that fits it, or ``tokens`` is too small or too large.
    """
    require_that(bool(paths), "text_encoders must name the folder of a text encoder, got nothing")
    require("transformers", "transformers", "text")
    families = [_family(Path(path)) for path in paths]
    for_t5 = "t5" in families
    encoders = []
    of_before = kinds if kinds is not None and len(kinds) == len(paths) else [None] * len(paths)
    for path, family, kind in zip(paths, families, of_before, strict=True):
        asked = tokens if for_t5 == (family == "t5") else None
        # the pooled vectors that Stable Diffusion 3 joins are projected
        joined = len(paths) > 1 and kind != "CLIPTextModel"
        encoders.append(_load(Path(path), family, asked, joined))
    lengths = {encoder.tokens for encoder in encoders if encoder.family == "clip"}
    require_that(
        len(lengths) < 2,
        f"CLIP encoders must have one number of tokens, these have {sorted(lengths)}",
    )
    return TextEncoders(encoders, paths)


def _read_config(folder: Path) -> dict:
    require_that(
        (folder / CONFIG).is_file(),
        f"text_encoders must name folders of text encoders, there is no {CONFIG} in {folder}",
    )
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        return {
            "model_type": str(config["model_type"]),
            "architectures": config.get("architectures"),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / CONFIG} is no configuration of a model: {why(error)}"
        ) from None


def _family(folder: Path) -> str:
    kind = _read_config(folder)["model_type"]
    require_that(
        kind in FAMILIES, f"{folder} must hold a text encoder, CLIP or T5, its model_type is {kind}"
    )
    return FAMILIES[kind]


def _load(folder: Path, family: str, tokens: int | None, joined: bool) -> Encoder:
    import transformers

    held = _read_config(folder)["architectures"] or ()
    # a whole CLIP has the projection too
    is_whole = joined and "CLIPModel" in held
    projected = "CLIPTextModelWithProjection" in held or is_whole
    given = {}
    if family == "t5":
        kind = transformers.T5EncoderModel
    elif projected:
        kind = transformers.CLIPTextModelWithProjection
    else:
        kind = transformers.CLIPTextModel
    try:
        with quiet(transformers.utils.logging):
            if is_whole:
                # the width of its projection is the whole model's, the text's own may be another
                whole = transformers.CLIPConfig.from_pretrained(folder, local_files_only=True)
                whole.text_config.projection_dim = whole.projection_dim
                given["config"] = whole.text_config
            model, info = kind.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, **given
            )
    except Exception as error:
        # transformers, safetensors and torch each raise their own types
        raise ValueError(
            f"{folder} holds no readable {kind.__name__}: {first_line(error)}"
        ) from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} weights of its {kind.__name__}, the first is {missing[0]}"
        )
    model = model.float().eval().requires_grad_(False)
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, model.config, family, folder)
    if family == "t5":
        length = T5_TOKENS if tokens is None else tokens
        width, pooled, most = model.config.d_model, 0, length
    else:
        most = model.config.max_position_embeddings
        length = most if tokens is None else tokens
        width = model.config.hidden_size
        pooled = model.config.projection_dim if projected else width
    require_that(
        FEWEST <= length <= most,
        f"text_tokens must be from {FEWEST} on, and at most {most} for {folder}, got {length}",
    )
    identity = {
        "class": kind.__name__,
        "sha256": _sha256(model, tokenizer, family),
        "tokens": length,
        "width": width,
        "pooled": pooled,
    }
    return Encoder(model, tokenizer, family, length, width, pooled, identity)


def load_tokenizer(folder: Path):
    import transformers

    number = folder.name.removeprefix(ENCODER_FOLDER)
    beside = folder.parent / f"{TOKENIZER_FOLDER}{number}"
    places = [folder, beside] if folder.name.startswith(ENCODER_FOLDER) else [folder]
    found = [place for place in places if any((place / name).is_file() for name in TOKENIZERS)]
    require_that(bool(found), f"there is no tokenizer in {' or '.join(map(str, places))}")
    try:
        with quiet(transformers.utils.logging):
            return transformers.AutoTokenizer.from_pretrained(
                found[0], local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        # transformers and tokenizers each raise their own types
        raise ValueError(f"{found[0]} holds no readable tokenizer: {first_line(error)}") from None


def check_tokenizer(tokenizer, config, family: str, folder: Path) -> None:
    """ValueError for a tokenizer of another model."""
    require_that(
        len(tokenizer) <= config.vocab_size and tokenizer.pad_token_id is not None,
        f"the tokenizer of {folder} must have at most the model's {config.vocab_size} tokens and "
        f"one for padding, it has {len(tokenizer)}, and {tokenizer.pad_token} for padding",
    )
    if family == "t5":
        return
    # the pooled vector is the state of this token; in configurations that say 2, which was a
    # mistake of theirs, that of the token of the highest number
    end = len(tokenizer) - 1 if config.eos_token_id == 2 else config.eos_token_id
    require_that(
        tokenizer.eos_token_id == end,
        f"the tokenizer of {folder} must end a prompt with token {end}, it ends it with "
        f"{tokenizer.eos_token_id}",
    )


def _sha256(model: nn.Module, tokenizer, family: str) -> str:
    """Of what decides the features: weights, configuration and vocabulary."""
    digest = weights_digest(model.state_dict())
    settings = {name: getattr(model.config, name) for name in DECISIVE[family]}
    vocabulary = sorted(tokenizer.get_vocab().items())
    held = [settings, vocabulary, tokenizer.pad_token_id]
    digest.update(json.dumps(held, sort_keys=True).encode())
    return digest.hexdigest()
