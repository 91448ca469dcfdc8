"""The published code's loop, around a stand-in with its layout and its signatures."""

from itertools import pairwise

import pytest
import torch

from benchmarks.step.published_step import PublishedStep
from benchmarks.step.steps import OneBatch
from benchmarks.step.variants import Variant

MODEL = """
import torch
class SiT(torch.nn.Module):
    def __init__(self, input_size, num_classes, use_cfg, fused_attn, qk_norm, decoder_hidden_size=768):
        super().__init__()
        assert decoder_hidden_size == 384
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(12))
        self.frozen = torch.nn.Parameter(torch.ones(4), requires_grad=False)
    def forward(self, x, t, y, ad):
        tokens = x.flatten(2).transpose(1, 2)
        for i, layer in enumerate(self.layers):
            tokens = tokens + layer(tokens)
            if i + 1 == ad:
                features = tokens
        return tokens.transpose(1, 2).reshape(x.shape), features, y
SiT_models = {"SiT-S/8": SiT}
"""
LOSS = """
class SRALoss:
    def __init__(self, block_out_s, block_out_t, t_max, loss_type):
        assert (block_out_s, block_out_t, t_max, loss_type) == (3, 8, 0.2, "sml1")
    def __call__(self, model, images, teacher, labels):
        out, features, _ = model(images, images[:, 0, 0, 0], y=labels, ad=3)
        target = teacher(images, images[:, 0, 0, 0], y=labels, ad=8)[1]
        assert out.dtype == target.dtype and not target.requires_grad and features.requires_grad
        return (out - 1).square().mean((1, 2, 3)) / 1e3, (features - target).square().mean() / 1e3
"""
# with this eps AdamW sees the scale of the gradients
SETTINGS = "+optim.lr=0.03+optim.eps=1e-5+train.ema_decay=0.5+align.student_layer=3"
STEPS = 8


@pytest.fixture
def checkout(tmp_path):
    for name, text in {"models/sit.py": MODEL, "loss.py": LOSS}.items():
        path = tmp_path / "SiT-SRA" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_the_published_loop_learns_and_moves_its_teacher(checkout):
    device = torch.device("cpu")
    losses = {}
    for precision, dtype in {"fp32": "float32", "bf16": "float16"}.items():
        variant = Variant.parse(f"reference{SETTINGS}+train.precision={precision}")
        cfg = variant.configuration("SiT-S/8", 64, 4, "cpu")
        run = PublishedStep(cfg, str(checkout), OneBatch(cfg, device), device)
        assert run.dtype == dtype
        assert run.scaler.is_enabled() == (precision == "bf16")

        initial = [p.clone() for p in run.model.parameters()]
        sums = [0.0]
        for i in range(STEPS):
            run.step(i)
            sums.append(float(run.loss_sum))
        losses[precision] = [after - before for before, after in pairwise(sums)]
        weights = zip(initial, run.model.parameters(), run.ema.parameters(), strict=True)
        for start, p, average in weights:
            if p.requires_grad:
                # the EMA lies between the start and the student, closer to the student
                assert 0 < (p - average).norm() < 0.6 * (p - start).norm()
    assert losses["fp32"][-1] < 0.9 * losses["fp32"][0]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


def test_a_checkout_is_needed(tmp_path):
    cfg = Variant.parse("reference").configuration("SiT-S/8", 64, 4, "cpu")
    with pytest.raises(ValueError, match="needs --published PATH"):
        PublishedStep(cfg, None, None, torch.device("cpu"))
