"""The loader's benchmark: the data set that it makes, and its report."""

import re

import torch

from benchmarks.step import latent_loader


def test_packed_noise_is_a_data_set(tmp_path):
    data = latent_loader.packed_noise(tmp_path / "packed", 40, 64)
    assert len(data) == 40
    moments, labels = data.__getitems__([0, 39])
    assert moments.shape == (2, 8, 8, 8)
    assert labels.tolist() == [0, 39]
    assert torch.isfinite(moments.float()).all()


def test_a_line_for_every_number_of_workers(capsys):
    words = "--images 40 --side 64 --batch 4 --workers 0 --steps 3 --step_ms 1"
    latent_loader.main(words.split())
    pattern = r"0 loader processes: +\d+ latents/s; a step of 1 ms waits \d+\.\d\d ms \(median\)"
    assert re.search(pattern, capsys.readouterr().out)
