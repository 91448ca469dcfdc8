"""Preprocessing resumes in folders of older versions, which kept less of the VAE."""

import json

import pytest

from sra_fast.data.ownership import Ownership
from sra_fast.data.packed import RECIPE

VAE = {"sha256": "a" * 64, "scaling_factor": 0.3, "shift_factor": 0.0}
STATISTICS = {"latents_mean": [0.0, 1.0], "latents_std": [1.0, 2.0]}


def check(folder, begun: dict, now: dict) -> None:
    """Compare the recipe of a folder with that of a process."""
    (folder / RECIPE).write_text(json.dumps({"kind": "moments", "vae": begun}))
    Ownership(folder, {"kind": "moments", "vae": now}, rank=0).check()


def test_the_statistics_of_a_vae_change_no_moments(tmp_path):
    check(tmp_path, VAE, VAE | STATISTICS)
    check(tmp_path, VAE | STATISTICS, VAE | STATISTICS)
    check(tmp_path, VAE, VAE)


@pytest.mark.parametrize(
    "begun, now",
    [
        (VAE, VAE | STATISTICS | {"sha256": "b" * 64}),
        (VAE, VAE | {"scaling_factor": 0.4}),
        # a configuration that has lost them is another one
        (VAE | STATISTICS, VAE),
        (VAE | STATISTICS, VAE | STATISTICS | {"latents_std": [1.0, 3.0]}),
        (None, VAE),
        (VAE, None),
    ],
)
def test_another_vae_is_refused(tmp_path, begun, now):
    with pytest.raises(ValueError, match="was begun with vae .*, this run has .* delete it or"):
        check(tmp_path, begun, now)
