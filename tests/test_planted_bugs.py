"""Planted bugs turn tests red: one or two of tests/planted_bugs.py for every kernel, without a
copy of the tree.

Bugs that make a kernel write outside its tensors are not among them.
"""

import re
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from planted_bugs import BUGS, ROOT, misplaced

sys.path.append(str(ROOT / "tests" / "ops"))
import test_adaln
import test_adaln_linear
import test_adamw_ema
import test_adamw_ema_device_step
import test_align_distance
import test_ema_update
import test_gated_residual
import test_gated_residual_adaln
import test_noise_pair
import test_optional_vectors
import test_qk_norm_rope
import test_swiglu
import test_tables
import test_two_modulations

fused = lambda device: test_gated_residual_adaln.test_variants(2, 3, 88, "layer", 0, True)
plain = lambda device: test_gated_residual.test_forward_and_gradients(
    2, 5, 64, 0, True, torch.float32
)
two = lambda device: test_two_modulations.test_forward_and_gradients(72, "rms", torch.float32)
adaln = lambda device: test_adaln.test_variants(2, 3, 88, "image", "layer")
per_token = lambda device: test_optional_vectors.test_widths(
    test_optional_vectors.WITH_KERNELS[4], (2, 5, 64), torch.float32
)
sandwich = lambda device: test_optional_vectors.test_widths(
    test_optional_vectors.WITH_KERNELS[0], (2, 5, 64), torch.float32
)
table = lambda which: (
    lambda device: test_tables.test_forward_and_gradients(
        test_tables.IN_THE_KERNEL[which], "triton"
    )
)
layers = lambda op: (
    lambda device: test_adaln_linear.test_forward_and_gradients(
        op, 1, 17, 72, 100, torch.float32, True
    )
)
align = lambda kind: (
    lambda device: test_align_distance.test_forward_and_gradients(kind, False, (2, 7, 72), device)
)
# the bug, and the fastest test that must go red
CHECKS = {
    "tail left out of the statistics": fused,
    "first partial sum dropped": plain,
    "partial sums of the wrong gradient": fused,
    "scale without the one": adaln,
    "shift and scale swapped": adaln,
    "dx without c1": adaln,
    "dscale without xhat": adaln,
    "residual sign": plain,
    "bias not added": plain,
    "plain: dy without the gate": plain,
    "plain: dgate without the bias": plain,
    "fused: h from x": fused,
    "fused: tail of h lost": fused,
    "fused: dgate from dh": fused,
    "fused: dshift forgets rows": fused,
    "two: h2 with the first scale": two,
    "two: dx without h2": two,
    "per token: dweight from dh": per_token,
    "per token: dbias without the gate": per_token,
    "per token: the gate of another token": per_token,
    "table: not added to the gate": table(1),
    "table: the sum of another slot": table(0),
    "sandwich: the stream lost": sandwich,
    "one is added to a factor": sandwich,
    "recomputed h without the scale": layers("linear"),
    "recomputed h, its tail lost": layers("linear"),
    "slope of GELU without its cube": layers("mlp"),
    "GELU's own value from dx": layers("mlp"),
    "l2 gradient without its 2": align("l2"),
    "mean over the padded width": align("l1"),
    "distances of image 0 overwritten": align("cosine_token"),
    "gradient scaled by the wrong length": align("cosine_token"),
    "channel gradient divided by D": align("cosine_token"),
    "heads: rotated the other way": lambda device: test_qk_norm_rope.test_forward_and_gradients(
        16, "half", torch.float32
    ),
    "heads: dx without c1": lambda device: test_qk_norm_rope.test_forward_and_gradients(
        16, "interleaved", torch.float32
    ),
    "swiglu: dx2 of the gate": lambda device: test_swiglu.test_both_passes(1, 16, torch.float32),
    "velocity with the wrong sign": lambda device: test_noise_pair.test_forward(
        (3, 3, 7, 5), "linear", False, device
    ),
    "latent scale dropped": lambda device: test_noise_pair.test_forward(
        (3, 3, 7, 5), "cosine", True, device
    ),
    "weight and decay swapped": lambda device: test_ema_update.test_update(
        [torch.float32], 0.9999, device
    ),
    "copy of the parameter": lambda device: test_ema_update.test_copies(torch.float16, device),
    "no weight decay": lambda device: test_adamw_ema.test_step(5, torch.float16, device),
    "no second bias correction": lambda device: test_adamw_ema.test_step(5, torch.float16, device),
    "an update that is not taken is stored": lambda device: (
        test_adamw_ema_device_step.test_an_update_that_is_not_taken_changes_no_bit(
            5, "triton", float("nan"), device
        )
    ),
}


def plant(name: str, monkeypatch, folder: Path) -> None:
    """Make the launchers launch the kernels of a copy of kernels/ with the bug."""
    ((path, old, new),) = [bug[1:4] for bug in BUGS if bug[0] == name]
    package = "planted_" + re.sub(r"\W+", "_", name)
    shutil.copytree(
        ROOT / "kernels", folder / package, ignore=shutil.ignore_patterns("__pycache__")
    )
    file = folder / package / Path(path).name
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    monkeypatch.syspath_prepend(folder)
    for source in (ROOT / "kernels").glob("*.py"):
        module, broken = (
            import_module(f"{where}.{source.stem}") for where in ("sra_fast.kernels", package)
        )
        for kernel in (name for name in vars(broken) if name.endswith("_kernel")):
            monkeypatch.setattr(module, kernel, getattr(broken, kernel))


@pytest.mark.parametrize("name", CHECKS)
def test_a_bug_is_noticed(name, monkeypatch, tmp_path, device):
    plant(name, monkeypatch, tmp_path)
    with pytest.raises(AssertionError):
        CHECKS[name](device)


def test_every_pattern_occurs_exactly_once():
    assert misplaced() == []
