"""Names and rules of averages are checked when a configuration is read."""

import re

import pytest
import yaml
from tiny_config import config, read_config

from sra_fast.config.cli import save_config
from sra_fast.config.schema import Average
from sra_fast.training.checks import check_config
from sra_fast.training.plan import fill_in

pytestmark = pytest.mark.usefixtures("rooms")
BOTH = "{slow: {decay: 0.9999}, narrow: {sigma_rel: 0.05}}"


def checked(*args: str):
    cfg = config(*args)
    fill_in(cfg)
    check_config(cfg)
    return cfg


@pytest.mark.parametrize(
    "args",
    [
        ("--train.averages", BOTH),
        ("--train.averages.slow.decay", "0.9999", "--train.averages.narrow.sigma_rel=5e-2"),
    ],
)
def test_averages_of_the_command_line(args):
    expected = {"slow": Average(decay=0.9999), "narrow": Average(sigma_rel=0.05)}
    assert checked(*args).train.averages == expected


def test_averages_of_a_file(tmp_path):
    file = tmp_path / "more.yaml"
    file.write_text(yaml.safe_dump({"train": {"averages": {"slow": {"decay": 0.9}}}}))
    cfg = checked("--config", str(file), "--sample.weights", "slow")
    assert cfg.train.averages == {"slow": Average(decay=0.9)}
    save_config(cfg, tmp_path / "saved.yaml")
    assert read_config(tmp_path / "saved.yaml") == cfg


@pytest.mark.parametrize("name", ["ema", "model", "slow", "narrow", "power:0.07"])
def test_names_that_a_run_may_sample_from(name):
    args = ("--train.averages", BOTH, "--train.average_snapshots", "10", "--sample.weights", name)
    assert checked(*args).sample.weights == name


@pytest.mark.parametrize(
    "args, message",
    [
        *(
            (
                ("--train.averages", f"{{'{name}': {{decay: 0.9}}}}"),
                f"_-, .* none of ema, .* '{re.escape(name)}'",
            )
            for name in (
                "ema",
                "model",
                "main",
                "a/b",
                "a b",
                "power:0.1",
                "",
                ".",
                "..",
                ".a",
                "-a",
                "_",
            )
        ),
        (("--train.averages", "{1: {decay: 0.9}}"), "train.averages as text of .* got 1$"),
        (("--train.averages", "{true: {decay: 0.9}}"), "train.averages as text of .* got True$"),
        (("--train.averages", "{a: {}}"), "a needs decay or sigma_rel, one of them, got neither"),
        (
            ("--train.averages", "{a: {decay: 0.9, sigma_rel: 0.1}}"),
            "a needs decay or sigma_rel, one of them, got {'decay': 0.9, 'sigma_rel': 0.1}",
        ),
        (("--train.averages", "{a: {decay: 1.1}}"), r"a.decay must lie in \[0, 1\], got 1.1"),
        (("--train.averages", "{a: {decay: .nan}}"), "a.decay must lie in"),
        (
            ("--train.averages", "{a: {sigma_rel: 0.3}}"),
            r"a.sigma_rel: expected .* \[1e-06, 0.2887\]",
        ),
        (("--train.average_snapshots", "5"), "5 needs an average with sigma_rel"),
        (("--train.average_snapshots", "-1"), "must not be negative, got -1"),
        (
            ("--sample.weights", "slow"),
            "sample.weights: expected weights of ema, model, got 'slow'",
        ),
        (("--sample.weights", "power:0.1"), "it needs train.average_snapshots"),
        (
            ("--train.averages", "{narrow: {sigma_rel: 0.05}}", "--train.average_snapshots", "100")
            + ("--train.steps", "400", "--sample.weights", "power:0.1"),
            "power:0.1 cannot be made from this run's snapshots: .* wrong by 49%, expected at most 10%",
        ),
        (("--sample.weights", "power:1"), "weights power:1: expected a relative width"),
        (("--sample.weights", "power:1e-300"), r"a relative width in \[1e-06, 0.2887\] .* 1e-300"),
        (
            ("--train.averages", "{a: {sigma_rel: 1.0e-200}}"),
            "a.sigma_rel: expected a relative width",
        ),
        (
            ("--sample.weights", "power:"),
            "expected weights power:SIGMA, as power:0.1, got 'power:'",
        ),
    ],
)
def test_what_is_wrong_is_one_line(args, message):
    with pytest.raises(ValueError, match=message) as caught:
        checked(*args)
    assert "\n" not in str(caught.value)
