"""MFU counts the student alone; with teacher, everything that is computed."""

import pytest
import torch

from benchmarks.step import measure_case
from benchmarks.step.variants import Variant


def test_mfu_with_teacher_counts_more_than_mfu(monkeypatch):
    monkeypatch.setattr(measure_case, "peak_flops", lambda *args: 2e12)
    monkeypatch.setattr(measure_case, "training_flops", lambda cfg: (1e9, 3e9))
    cfg = Variant.parse("sra").configuration("SiT-S/2", 256, 4, "cpu")
    found = measure_case.rates(cfg, torch.device("cpu"), 8.0)
    # 4 images in 8 ms are 500 per second
    assert found["images_per_s"] == pytest.approx(500)
    assert found["mfu"] == pytest.approx(500 * 1e9 / 2e12)
    assert found["mfu_with_teacher"] == pytest.approx(500 * 3e9 / 2e12)
    assert found["flops_per_s"] == pytest.approx(500 * 3e9)
