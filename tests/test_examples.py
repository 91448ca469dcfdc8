import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/dit_block.py"


def test_fused_block_is_the_plain_one(device, monkeypatch):
    """With the references and with the kernels, which a CPU would not choose by default."""
    compare = runpy.run_path(str(EXAMPLE))["compare"]
    for backend in ("torch", "triton"):
        monkeypatch.setenv("SRA_FAST_BACKEND", backend)
        assert compare(device) < 1e-4


def test_one_line_is_the_plain_model(device, monkeypatch):
    """Every norm is modulated and every residual gated by an operator, across blocks."""
    compare = runpy.run_path(str(ROOT / "examples/one_line_dit.py"))["compare"]
    for backend in ("torch", "triton"):
        torch._dynamo.reset()
        monkeypatch.setenv("SRA_FAST_BACKEND", backend)
        difference, report = compare(device, then="eager")
        assert difference < 1e-4
        assert report.rewrites == {"adaln": 1, "gated_residual_adaln": 8}


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_the_page_shows_runs(backend, device, monkeypatch):
    monkeypatch.setenv("SRA_FAST_BACKEND", backend)
    code = "\n".join(
        re.findall(r"```python\n(.*?)```", (ROOT / "docs/use_the_ops.md").read_text(), re.DOTALL)
    )
    with torch.device(device):
        names = {}
        exec(compile(code, "docs/use_the_ops.md", "exec"), names)
    teacher = names["teacher"][0].weight
    student = names["student"][0].weight
    assert names["h"].isfinite().all() and names["loss"].isfinite()
    assert 0 < (teacher - student).abs().max() < 0.01 and not teacher.requires_grad
