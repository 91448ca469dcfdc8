"""FID's network against torch-fidelity's, with random weights, and its resize against TensorFlow
1's.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from golden import assert_matches

from sra_fast.evaluation.inception import load_inception, resize_tf1

GOLDEN = np.load(Path(__file__).parents[1] / "golden/inception.npz")
IMAGES = torch.from_numpy(GOLDEN["images"])


def random_weights() -> dict[str, torch.Tensor]:
    """The weights that the golden outputs were computed with, under torch-fidelity's names and
    shapes.
    """
    rng = np.random.RandomState(0)
    state = {}
    for name, padded in zip(GOLDEN["names"].tolist(), GOLDEN["shapes"].tolist(), strict=True):
        shape = tuple(size for size in padded if size)
        x = rng.standard_normal(shape).astype(np.float32)
        if name.endswith("conv.weight"):
            x *= (2 / np.prod(shape[1:])) ** 0.5
        elif name == "fc.weight":
            x *= 2048**-0.5 * 4
        elif name.endswith("bn.weight"):
            x = 1 + 0.1 * x
        elif name.endswith("running_var"):
            x = np.exp(0.3 * x)
        else:
            x *= 0.1
        state[name] = torch.from_numpy(x)
    return state


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(random_weights(), path)
    return path


def test_names_shapes_and_outputs_are_torch_fidelitys(weights):
    model = load_inception(str(weights))
    ours = {
        name: [*x.shape]
        for name, x in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    assert ours == {name: [*x.shape] for name, x in random_weights().items()}
    assert len(ours) == 472
    with torch.inference_mode():
        outputs = dict(zip(("pool", "spatial", "logits"), model(IMAGES), strict=True))
        grey = model(IMAGES[:, :1])
        colour = model(IMAGES[:, :1].repeat(1, 3, 1, 1))
    for name, output in outputs.items():
        assert_matches(output, torch.from_numpy(GOLDEN[name]), 1e-4)
    assert torch.equal(grey[0], colour[0])
    assert not torch.equal(grey[0], outputs["pool"])


@pytest.mark.parametrize(
    "shape, size",
    [((8, 8), 299), ((64, 48), 299), ((299, 299), 299), ((31, 512), 100), ((1, 5), 7)],
)
def test_resize_is_tensorflow_1s(shape, size):
    """numpy's linear interpolation at i H / size in fp64, constant beyond the last pixel."""
    pixels = np.random.RandomState(0).randint(0, 256, (2, 3, *shape))
    images = torch.from_numpy(pixels.astype(np.float32))

    def line(values):
        return np.interp(np.arange(size) * len(values) / size, np.arange(len(values)), values)

    rows = np.apply_along_axis(line, 3, images.double().numpy())
    expected = np.apply_along_axis(line, 2, rows)
    # positions are fp32 as in TensorFlow: up to 2e-5 pixels off, times a step of up to 255
    torch.testing.assert_close(
        resize_tf1(images, size).double(), torch.from_numpy(expected), rtol=0, atol=1e-2
    )
    if shape == (299, 299):
        assert torch.equal(resize_tf1(images, size), images)


def test_other_files_are_refused(tmp_path, weights):
    state = torch.load(weights)
    path = tmp_path / "other.pth"
    message = "other.pth does not hold the weights of weights-inception-2015-12-05-6726825d.pth: "
    source = "95 628 359 bytes, SHA-256 6726825d[0-9a-f]{55}.*torch-fidelity.*pytorch-fid"
    with pytest.raises(ValueError, match=f"there is no .*other.pth, expected .*{source}"):
        load_inception(str(path))
    without_a_key = dict(state)
    del without_a_key["Mixed_7c.branch1x1.conv.weight"]
    for other, reason in (
        (without_a_key, "Missing key.*Mixed_7c.branch1x1"),
        (state | {"AuxLogits.fc.bias": torch.zeros(1)}, "Unexpected key.*AuxLogits"),
        (state | {"fc.weight": state["fc.weight"][:1000]}, "size mismatch for fc.weight"),
        ([1, 2], "got <class 'list'>"),
        ({"model": torch.nn.Linear}, "no file of tensors"),
    ):
        torch.save(other, path)
        with pytest.raises(ValueError, match=message + ".*" + reason):
            load_inception(str(path))
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=message):
        load_inception(str(path))
