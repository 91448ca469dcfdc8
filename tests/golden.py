"""Outputs of the published code (fp32, CPU) on small random networks.

golden/README.md says what each key is.
"""

from pathlib import Path

import numpy as np
import torch

from sra_fast.models import arguments_from_state_dict


class Golden:
    def __init__(self, family: str):
        self.arrays = np.load(Path(__file__).parent / "golden" / f"{family.lower()}_tiny.npz")

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key])

    def tree(self, prefix: str) -> dict[str, torch.Tensor]:
        return {
            k.removeprefix(prefix + "/"): self[k]
            for k in self.arrays.files
            if k.startswith(prefix + "/")
        }

    def model(self, weights: str = "sd"):
        family, arguments = arguments_from_state_dict(self.tree("sd"), num_heads=2)
        model = family(**arguments)
        model.load_state_dict({**model.state_dict(), **self.tree(weights)}, strict=True)
        return model


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    scale = expected.double().abs().max().clamp(min=1e-30)
    return ((actual.double() - expected.double()).abs().max() / scale).item()


def assert_matches(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape, f"shape {[*actual.shape]}, expected {[*expected.shape]}"
    error = relative_error(actual, expected)
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"
