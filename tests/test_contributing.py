"""The code on CONTRIBUTING.md's pages is right: its five parts train together and are used.

The code blocks are one module here, executed in their order.
"""

import importlib.util
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_config import config

from sra_fast.alignment.ema_teacher import EMATeacher
from sra_fast.analysis import held_out_loss
from sra_fast.checkpoint.load_model import load_model
from sra_fast.config.cli import parse_train
from sra_fast.diffusion.samplers import Guidance, sample
from sra_fast.models import SiT
from sra_fast.training.plan import make_run_plan
from sra_fast.training.run import run
from sra_fast.utils import registry
from sra_fast.zero.process_group import init_distributed

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"
PAGES = [
    "an alignment target",
    "a model family",
    "a sampler",
    "a learning-rate schedule",
    "a data set",
]
REGISTRIES = [part for part in vars(registry).values() if isinstance(part, registry.Registry)]

PARTS = (
    "--model.name SkipSiT-S/2 --model.num_classes 3 --data.name npz "
    "--align.target normed_teacher --align.norm_eps 1e-5 --sample.method midpoint "
    "--train.steps 3 --train.log_every 1 --train.precision fp32 --optim.lr 0.01 "
    "--optim.schedule trapezoid"
).split()


def sections() -> dict[str, str]:
    """Text of each page by its title."""
    _, *pages = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    return {title: text for title, _, text in (page.partition("\n") for page in pages)}


@pytest.fixture
def documented(tmp_path, monkeypatch):
    """What the code blocks define, as a module; what they register is forgotten afterwards."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    # an importable file: the command line reads types and docstrings of options from the source
    path = tmp_path / "documented.py"
    path.write_text("\n".join(blocks))
    before = [set(part) for part in REGISTRIES]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    yield module
    for part, names in zip(REGISTRIES, before, strict=True):
        for name in set(part) - names:
            part.remove(name)


@pytest.fixture
def array_file(tmp_path) -> Path:
    """Twenty-four random images of three classes."""
    path = tmp_path / "images.npz"
    images = np.random.uniform(-1, 1, (24, 1, 8, 8)).astype(np.float16)
    np.savez(path, images=images, labels=np.arange(24) % 3)
    return path


@pytest.mark.parametrize("title", PAGES)
def test_every_page_is_short_and_has_one_code_block(title):
    page = sections()[f"Add {title}"].strip()
    # blank lines do not count: the formatter sets those of the code
    assert len([line for line in page.splitlines() if line]) <= 30
    assert page.count("```python\n") == 1


def test_documented_parts_train_together(documented, array_file, tmp_path):
    cfg = config(*PARTS, "--data.path", str(array_file), "--train.out", str(tmp_path / "runs"))
    assert type(cfg.align) is documented.NormedTeacherConfig and cfg.align.norm_eps == 1e-5
    plan = make_run_plan(cfg)
    assert type(plan.data) is documented.ArrayFile and plan.data.num_classes == 3
    summary = run(plan, init_distributed())
    assert summary["loss_last"] < summary["loss_first"]

    # the run folder is enough to sample from the model
    loaded = load_model(summary["run_dir"])
    model, path = loaded.model, loaded.path
    assert type(model) is documented.SkipSiT
    assert model.skip.abs().max() > 0, "the new parameter was trained"
    noise = torch.randn(2, 1, 8, 8)
    labels = torch.tensor([0, 2])
    images = sample(model, noise, labels, cfg.sample.method, 1, path=path)
    x = noise.double()
    halfway = x - model(noise, torch.ones(2), labels) / 2
    expected = x - model(halfway, torch.full((2,), 0.5), labels)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)

    # and to analyse it on the data that it names
    options = held_out_loss.Options(str(summary["run_dir"]), images=4, bins=2, trained=True)
    report = held_out_loss.run(options)
    assert report["images"] == 4 and 0 < report["held_out"] < 10


def test_target_normalizes_the_teachers_features(documented, monkeypatch):
    features = torch.randn(2, 16, 32) * 5 + 3
    monkeypatch.setattr(EMATeacher, "result", lambda self: features)
    align = config("--align.target", "normed_teacher").align
    target = documented.NormedTeacher(align, torch.nn.Identity())
    torch.testing.assert_close(target.result(), F.layer_norm(features, (32,), eps=1e-6))


def test_family_adds_its_input(documented):
    """It starts as the SiT that it inherits from, with the same features."""
    torch.manual_seed(0)
    sizes = dict(input_size=8, in_channels=2, hidden_size=32, depth=2, num_heads=2)
    plain = SiT(**sizes).eval()
    model = documented.SkipSiT(**sizes).eval()
    torch.nn.init.normal_(plain.final_layer.linear.weight)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert missing == ["skip"] and not unexpected
    x = torch.randn(3, 2, 8, 8)
    inputs = (x, torch.rand(3), torch.tensor([0, 1, 2]))
    expected, expected_features = plain(*inputs, depths=(1,))
    prediction, features = model(*inputs, depths=(1,))
    assert torch.equal(prediction, expected)
    assert torch.equal(features.after[1], expected_features.after[1])

    share = torch.tensor([0.5, -2.0]).view(2, 1, 1)
    with torch.no_grad():
        model.skip.copy_(share)
    torch.testing.assert_close(model(*inputs), expected + share * x)


@pytest.mark.parametrize("num_steps", [1, 4, 7])
def test_sampler_is_the_midpoint_method(documented, num_steps):
    """dx/dt = x: a step of length h multiplies x by 1 - h + h^2/2."""
    model = SiT(input_size=8, in_channels=1, hidden_size=32, depth=1, num_heads=2).eval()
    guided = Guidance(model, torch.zeros(2, dtype=torch.int64), call=lambda x, t, condition: x)
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    images = documented.Midpoint()(guided, x, num_steps, "linear", 1.0, torch.randn_like)
    h = 1 / num_steps
    torch.testing.assert_close(images, x * (1 - h + h**2 / 2) ** num_steps)
    # of second order: the error falls with the square of the number of steps
    assert abs(float((images / x).mean()) - math.exp(-1)) < 0.2 * h**2


def test_options_are_documented(documented, capsys):
    with pytest.raises(SystemExit):
        parse_train(["--align.target", "normed_teacher", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "added to the variance of a token's features" in text


def test_nothing_stays_registered():
    names = {name for part in REGISTRIES for name in part}
    assert not names & {"normed_teacher", "SkipSiT", "midpoint", "npz"}
