"""Anybody's checkpoint as weights under the published parameter names.

Training code wraps a network and its state dict in many ways: DDP, FSDP and ``torch.compile`` put
words between the names, an EMA or a Lightning module puts words before them, and checkpoints nest
state dicts under keys. All of that is undone here. Values are checked in ``checkpoint/values.py``.
"""

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

# a parameter that every SiT, DiT and MMDiT has: what stands before it is a prefix
KNOWN_PARAMETER = "x_embedder.proj.weight"
# that of SiT and DiT, whose last row may be the null class
CLASS_TABLE = "y_embedder.embedding_table.weight"
# words that wrappers put before or between the names of modules
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# what SD3's files call their network, whichever weights it has
SD3_NETWORK = ("model", "diffusion_model")
# heads that other training methods add to a network; nothing that samples reads them
FOREIGN_HEADS = ("projectors.",)
# what a training checkpoint of the published code has besides weights
BESIDES = ("opt", "args", "epoch", "steps")
# names that a message has at most
SHOWN = 3


@dataclass
class _Weights:
    """A state dict that was found. ``place``: the keys and prefixes on the way to it."""

    place: tuple[str, ...]
    state: dict[str, Tensor]

    @property
    def words(self) -> set[str]:
        """``("state_dict", "ema_model")`` -> ``{"state", "dict", "ema", "model"}``."""
        place = self.place
        if place[-2:] == SD3_NETWORK:
            place = place[:-2]
        return {word for part in place for word in re.split(r"[^a-z]+", part.lower())}


def unwrapped(held, source: str) -> dict:
    """What a file holds, with its weights under the published names.

    Args:
        held: what was read: a state dict, or dictionaries that hold state dicts at any depth.
        source: where it was read from, for messages.

    Returns:
        ``"ema"`` and ``"model"`` (the student): state dicts, as far as there are both. The only
        weights of a file that does not name them are ``"ema"``, with ``"unnamed": True``. Besides
        them ``opt``, ``args`` (``argparse.Namespace``), ``epoch`` and ``steps`` of a training
        checkpoint.

    Raises:
        ValueError: no weights of a SiT, DiT or MMDiT, or more than two sets of them.
    """
    found = list(_find(held, ()))
    if not found:
        raise ValueError(_foreign(held, source))
    result: dict = {}
    for weights in found:
        if "ema" in weights.words:
            role = "ema"
        elif "model" in weights.words or any("ema" in other.words for other in found):
            role = "model"
        else:
            role = "ema"
            result["unnamed"] = True
        if role in result:
            places = ", ".join(".".join(weights.place) or "the file itself" for weights in found)
            raise ValueError(
                f"expected one student and one EMA in {source}, it holds weights at {places}"
            )
        result[role] = weights.state
    if isinstance(held, Mapping):
        result |= {key: held[key] for key in BESIDES if key in held}
    if isinstance(result.get("args"), Mapping):
        result["args"] = argparse.Namespace(**result["args"])
    return result


def _find(held, place: tuple[str, ...]) -> Iterator[_Weights]:
    """Every state dict of a SiT, DiT or MMDiT in nested dictionaries."""
    if not isinstance(held, Mapping):
        return
    tensors = _without_wrappers(held)
    prefixes = [
        name.removesuffix(KNOWN_PARAMETER)
        for name in tensors
        if name == KNOWN_PARAMETER or name.endswith("." + KNOWN_PARAMETER)
    ]
    # a name belongs to the longest prefix: an EMA may live inside of the student
    prefixes.sort(key=len, reverse=True)
    states: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        # a tensor without dimensions is the counter of an EMA, and no parameter
        if prefix is not None and tensor.dim():
            states[prefix][name.removeprefix(prefix)] = tensor
    for prefix, state in states.items():
        yield _Weights((*place, *prefix.split(".")[:-1]), state)
    for key, value in held.items():
        yield from _find(value, (*place, str(key)))


def _without_wrappers(held: Mapping) -> dict[str, Tensor]:
    """The tensors of a dictionary, their names without the words of wrappers."""
    tensors = {}
    for key, value in held.items():
        if not isinstance(value, Tensor):
            continue
        name = ".".join(word for word in str(key).split(".") if word not in WRAPPERS)
        if name in tensors:
            raise ValueError(f"two weights are called {name}, one of them {key}")
        tensors[name] = value
    return tensors


def all_names(held) -> list[str]:
    """Names of all tensors in nested dictionaries, without the keys on the way to them."""
    if not isinstance(held, Mapping):
        return []
    names = list(_without_wrappers(held))
    return names + [name for value in held.values() for name in all_names(value)]


def in_short(names: list[str]) -> str:
    """``a, b, c and 5 more``."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _foreign(held, source: str) -> str:
    """The line about a file without weights of ours, with the command that helps if there is
    one.
    """
    names = all_names(held)
    if any("transformer_blocks." in name for name in names):
        return (
            f"{source} holds weights under the names of diffusers: "
            "import-weights --from FOLDER --out FILE.safetensors converts a DiT or an SD3, FOLDER "
            "being the pipeline's"
        )
    line = (
        f"{source} holds neither a SiT or DiT state dict nor one of an MMDiT nor a checkpoint of the "
        "published code"
    )
    return f"{line}: its weights are {in_short(names)}" if names else f"{line}: it has no weights"
