"""Anybody's checkpoint is read under the published names; what is not read is named."""

import argparse

import pytest
import torch
from foreign import network, prefixed, same, weights

from sra_fast.checkpoint.names import in_short, unwrapped

STATE = weights(network())
EMA = weights(network(seed=1))


def inside(state: dict, word: str) -> dict:
    """A word of a wrapper inside of the names, as blocks that are compiled one by one have it."""
    return {
        name.replace("blocks.1.", f"blocks.1.{word}.").replace(
            "attn.qkv", f"attn.{word}.qkv"
        ): value
        for name, value in state.items()
    }


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "_orig_mod.",
        "model.",
        "ema.",
        "ema_model.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.module._orig_mod.",
        "ema_model.module.",
        "_orig_mod.ema.module.model.",
        "state.diffusion_model.net.module.module.",
        "_fsdp_wrapped_module.model._fsdp_wrapped_module.",
    ],
)
def test_prefixes_in_any_order_and_depth(prefix):
    held = unwrapped(prefixed(STATE, prefix), "a.pt")
    # a file that does not name its weights says nothing of an average
    assert held.pop("unnamed", False) == ("model" not in prefix and "ema" not in prefix)
    assert len(held) == 1
    assert same(*held.values(), STATE)


@pytest.mark.parametrize("word", ["_orig_mod", "_checkpoint_wrapped_module", "module"])
def test_words_of_wrappers_between_names(word):
    assert same(unwrapped(prefixed(inside(STATE, word), "model."), "a.pt")["model"], STATE)


@pytest.mark.parametrize(
    "keys",
    [
        ("state_dict",),
        ("model",),
        ("ema",),
        ("model_state_dict",),
        ("state_dict", "model"),
        ("checkpoint", "state_dict", "ema"),
    ],
)
def test_nested_containers(keys):
    held = prefixed(STATE, "module.")
    for key in reversed(keys):
        held = {"epoch": 3, key: held}
    found = unwrapped(held, "a.pt")
    role = (
        "ema" if "ema" in keys else "model" if {"model", "model_state_dict"} & set(keys) else "ema"
    )
    assert same(found[role], STATE) and found["epoch"] == 3
    assert found.pop("unnamed", False) == (keys == ("state_dict",))
    assert set(found) == {role, "epoch"}


@pytest.mark.parametrize(
    "held",
    [
        {"model": STATE, "ema": EMA},
        {"state_dict": {**prefixed(STATE, "model."), **prefixed(EMA, "ema_model.")}},
        {"net": prefixed(STATE, "module."), "net_ema": EMA},
        # ema_pytorch, whose counters are tensors without dimensions
        {
            **prefixed(STATE, "online_model."),
            **prefixed(EMA, "ema_model."),
            "initted": torch.tensor(True),
            "step": torch.tensor(7),
        },
        # an EMA inside of the student
        {**STATE, **prefixed(EMA, "ema.")},
        {"model": {**prefixed(STATE, "module."), "n_averaged": torch.tensor(3)}, "ema": EMA},
    ],
)
def test_student_and_ema_are_told_apart(held):
    found = unwrapped(held, "a.pt")
    assert same(found["model"], STATE) and same(found["ema"], EMA)


def test_what_a_training_checkpoint_has_besides():
    held = {"ema": EMA, "opt": {}, "steps": 5, "args": {"num_heads": 2}, "wandb": "x"}
    found = unwrapped(held, "a.pt")
    assert set(found) == {"ema", "opt", "steps", "args"}
    assert found["args"] == argparse.Namespace(num_heads=2)


@pytest.mark.parametrize(
    "held, message",
    [
        ({"a": 1}, "holds neither a SiT or DiT state dict nor .*: it has no weights"),
        ([], "it has no weights"),
        (
            {"state_dict": {"unet.in.weight": torch.zeros(1), "unet.in.bias": torch.zeros(1)}},
            "its weights are unet.in.weight, unet.in.bias$",
        ),
        (
            {"transformer_blocks.0.attn1.to_q.weight": torch.zeros(1)},
            "names of diffusers: import-weights --from FOLDER --out FILE.safetensors",
        ),
        (
            {"ema_a": EMA, "ema_b": EMA, "model": STATE},
            "expected one student and one EMA in a.pt, it holds weights at ema_a, ema_b, model",
        ),
        ({"a": STATE, "b": EMA}, "holds weights at a, b"),
        (
            {"module.pos_embed": torch.zeros(1), "pos_embed": torch.zeros(1)},
            "two weights are called pos_embed",
        ),
    ],
)
def test_what_is_not_read_is_named(held, message):
    with pytest.raises(ValueError, match=message) as error:
        unwrapped(held, "a.pt")
    assert "\n" not in str(error.value)


def test_long_lists_are_short():
    assert in_short(["a", "b"]) == "a, b"
    assert in_short(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
