import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sra_fast.config.schema import DataConfig
from sra_fast.data.dataset import open_data
from sra_fast.data.digits import Digits
from sra_fast.diffusion.draws import draw
from sra_fast.models import ClassLabels

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


def run_features_example(monkeypatch, out):
    """examples/digits_features.py at a tiny size, in this process."""
    words = ("digits_features.py", out, "--steps", 2, "--width", 16, "--depth", 1)
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    runpy.run_path(str(ROOT / "examples/digits_features.py"), run_name="__main__")


@pytest.mark.usefixtures("rooms")
def test_features_of_the_digits_fit_the_demo(monkeypatch, tmp_path, capsys):
    """What the example stores is what its model says of the digits, a feature for each token."""
    transformers = pytest.importorskip("transformers")
    run_features_example(monkeypatch, tmp_path)
    assert re.search(r"the ViT knows \d+\.\d% of the held-out digits", capsys.readouterr().out)
    path = str(tmp_path / "packed")
    data = open_data(DataConfig(name="digits", path=path, features="vit"))
    assert (data.features.tokens, data.features.width) == (16, 16)
    rows = [0, 7, 1436]
    images, _, features = data.split(data.__getitems__(rows))
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "vit").eval()
    with torch.no_grad():
        tokens = model.vit(images.expand(-1, 3, -1, -1)).last_hidden_state[:, 1:]
    # stored in fp16; pixels in uint8
    assert torch.allclose(features.float(), tokens, atol=0.02)


def test_the_features_example_needs_transformers(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit) as stopped:
        run_features_example(monkeypatch, tmp_path)
    expected = "error: digits_features.py needs transformers: pip install 'sra-fast[features]'"
    assert stopped.value.code == expected


def test_a_loop_of_ones_own_trains_with_sra(device, monkeypatch):
    """Its last step is written out: the loss of the paper with the EMA as teacher, then the EMA."""
    train = runpy.run_path(str(ROOT / "examples/sra_in_your_loop.py"))["train"]
    steps = 40
    seen = []
    of_rows = Digits.__getitems__
    monkeypatch.setattr(
        Digits, "__getitems__", lambda self, rows: seen.append(of_rows(self, rows)) or seen[-1]
    )
    student, ema, losses = train(steps, decay=0.75, device=device)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    after, ema_after, longer = train(steps + 1, decay=0.75, device=device)
    assert longer[:steps] == losses

    x0, labels = (part.to(device) for part in seen[-1])
    drawn = draw(0, steps, 0, tuple(x0.shape), device, drop_prob=0.1, posterior=False)
    condition = ClassLabels(labels, drawn.drop)
    t = drawn.uniform.view(-1, 1, 1, 1)
    earlier = (t - 0.2 * drawn.gap.view(-1, 1, 1, 1)).clamp(min=0)
    noised = lambda time: (1 - time) * x0 + time * drawn.noise
    prediction, features = student(noised(t), t.flatten(), condition, depths=(2,))
    deep = ema.eval().features(noised(earlier), earlier.flatten(), condition, depth=4)
    align = F.smooth_l1_loss(student.ap_head(features.after[2]), deep, beta=0.05)
    loss = (prediction - (drawn.noise - x0)).square().mean() + 0.2 * align
    assert longer[-1] == pytest.approx(loss.item(), rel=1e-4)
    before, now = ema.state_dict(), after.state_dict()
    for name, value in ema_after.state_dict().items():
        torch.testing.assert_close(value, torch.lerp(before[name], now[name], 0.25))


def test_a_loop_of_ones_own_needs_no_deepspeed():
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); assert 'deepspeed' not in sys.modules"
    example = str(ROOT / "examples/sra_in_your_loop.py")
    subprocess.run([sys.executable, "-c", code, example], check=True, cwd=ROOT)


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
