"""Extractors by name: the built-in one, TorchScript files, functions and modules of the user."""

import sys

import pytest
import torch
from torch import nn

from sra_fast.evaluation.extractors import coarse_pixels, feature_width, named_extractor

CPU = torch.device("cpu")


class Network(nn.Module):
    """uint8 [N, 1, 8, 8] -> features [N, 32] and logits [N, 10]."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(64, 32)
        self.out = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor):
        x = torch.relu(self.hidden(images.flatten(1).float() / 127.5 - 1))
        return x, self.out(x)


def test_extractors_by_name(tmp_path, monkeypatch):
    images = torch.arange(128, dtype=torch.uint8).view(2, 1, 8, 8)
    network = Network().eval()
    torch.jit.trace(network, images).save(str(tmp_path / "net.pt"))
    from_file = named_extractor(str(tmp_path / "net.pt"), [8, 8, 1], CPU)
    torch.testing.assert_close(from_file(images).logits, network(images)[1])
    assert from_file.name.startswith("net-")
    assert not from_file.official
    assert not from_file.inception

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "my_pixels.py").write_text(
        "import torch\nWEIGHT = 1.0\n"
        "def features(x):\n    return WEIGHT * x.flatten(1).float()\n"
        "def broken(x):\n    return x.float()\n"
        "def infinite(x):\n    return x.flatten(1) / 0.0\n"
        "network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.9))\n"
    )
    mine = named_extractor("my_pixels:features", [8, 8, 1], CPU)
    features = mine(images)
    assert features.pool.tolist() == images.flatten(1).tolist()
    assert features.spatial is None
    assert features.logits is None
    assert mine.name.startswith("my_pixels.features-")
    assert named_extractor("my_pixels:features", [8, 8, 1], CPU).name == mine.name
    # other weights in the same code get another name
    import my_pixels

    my_pixels.WEIGHT = 1.1
    assert named_extractor("my_pixels:features", [8, 8, 1], CPU).name != mine.name
    # a network is put in eval mode: its dropout does nothing
    module = named_extractor("my_pixels:network", [8, 8, 1], CPU)
    assert torch.equal(module.compute(images), images.flatten(1))

    (tmp_path / "text.pt").write_text("no TorchScript")
    for spec, shape, message in (
        (
            "my_pixels:broken",
            [8, 8, 1],
            r"my_pixels.broken must give \[1, D\] or .* it gave \[1, 1, 8, 8\]",
        ),
        ("my_pixels:infinite", [8, 8, 1], "not finite"),
        ("my_pixels:absent", [8, 8, 1], "cannot be imported: .*absent"),
        ("no_such_module:f", [8, 8, 1], "cannot be imported: No module named"),
        (
            "nowhere.pt",
            [8, 8, 1],
            "must be pixels, a TorchScript file or module:function, got nowhere.pt",
        ),
        (str(tmp_path / "text.pt"), [8, 8, 1], "text.pt is no TorchScript file"),
        (str(tmp_path / "net.pt"), [16, 16, 3], r"net.pt failed on uint8 \[1, 3, 16, 16\]"),
    ):
        with pytest.raises(ValueError, match=message):
            named_extractor(spec, shape, CPU)


def test_coarse_pixels():
    images = torch.arange(2 * 3 * 16 * 16).remainder(251).to(torch.uint8).view(2, 3, 16, 16)
    expected = images.float().view(2, 3, 8, 2, 8, 2).mean((3, 5)).flatten(1) / 127.5 - 1
    torch.testing.assert_close(coarse_pixels(images), expected)
    # a small image is not averaged
    small = images[:, :1, :4, :5]
    assert torch.equal(coarse_pixels(small), small.float().flatten(1) / 127.5 - 1)
    assert feature_width(named_extractor("pixels", [16, 16, 3], CPU), [4, 5, 1]) == 20
