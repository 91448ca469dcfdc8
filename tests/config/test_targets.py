"""The options below ``align`` are those of the target that the arguments name."""

from dataclasses import dataclass
from typing import get_args

import pytest
from tiny_config import read_config

from sra_fast.alignment.target import Target
from sra_fast.config.cli import parse_train, save_config
from sra_fast.config.schema import AlignConfig, Distance
from sra_fast.ops.align_distance import KINDS
from sra_fast.utils.registry import TARGETS

pytestmark = pytest.mark.usefixtures("rooms")


@dataclass
class ToyConfig(AlignConfig):
    """Options of a toy target."""

    toy_scale: float = 1.0
    """size of the target features"""


@pytest.fixture
def toy():
    TARGETS.register("toy")(type("Toy", (Target,), {"config": ToyConfig}))
    yield
    TARGETS.remove("toy")


def write(path, text):
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "args",
    [
        "--align.target toy --align.toy_scale 2",
        "--align.target ema_teacher --align.target toy --align.toy_scale 2",
        "--align.target=none --align.target=toy --align.toy_scale 2",
        "--config FILE --align.toy_scale 2",
        "--config=FILE --align.toy_scale 2",
        "--config OTHER --config FILE --align.toy_scale 2",
        "--config OTHER --align.target toy --align.toy_scale 2",
    ],
)
def test_last_named_target_gives_the_options(toy, tmp_path, args):
    file = write(tmp_path / "toy.yaml", "align: {target: toy}")
    other = write(tmp_path / "other.yaml", "align: {target: ema_teacher}")
    cfg, _ = parse_train(args.replace("FILE", file).replace("OTHER", other).split())
    assert cfg.align == ToyConfig(target="toy", toy_scale=2)


def test_saved_config_of_another_target_turned_off_reads_back(toy, tmp_path):
    file = write(tmp_path / "toy.yaml", "align: {target: toy, toy_scale: 3}")
    cfg, _ = parse_train(["--config", file, "--align", "none"])
    assert cfg.align == ToyConfig(target="none", toy_scale=3)
    save_config(cfg, tmp_path / "saved.yaml")
    assert read_config(tmp_path / "saved.yaml") == cfg


def test_file_that_only_turns_alignment_off_keeps_the_options(toy, tmp_path):
    file = write(tmp_path / "off.yaml", "align: {target: none, weight: 0.5}")
    cfg, _ = parse_train(["--align.target", "toy", "--align.toy_scale", "2", "--config", file])
    assert cfg.align == ToyConfig(target="none", toy_scale=2, weight=0.5)


@pytest.mark.parametrize("text", ["align: [1\n", "- 1\n", "", "align: 3\n", "train: 3\n", None])
def test_broken_or_missing_file_is_one_message(capsys, tmp_path, text):
    file = tmp_path / "broken.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        parse_train(["--config", str(file)])
    assert stopped.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        "--align self_flow --config FILE",
        "--config FILE --align self_flow",
        "--align=self_flow --config=FILE",
    ],
)
def test_file_without_a_target_has_options_of_the_one_that_is_named(tmp_path, args):
    """In any order, also where they are options of another target too."""
    file = write(tmp_path / "layers.yaml", "align: {student_layer: 2, teacher_layer: 3}")
    cfg, _ = parse_train(args.replace("FILE", file).split())
    assert type(cfg.align) is TARGETS["self_flow"].config
    assert (cfg.align.target, cfg.align.teacher_layer, cfg.align.weight) == ("self_flow", 3, 0.8)


def test_second_target_has_options_of_its_own(tmp_path, capsys):
    text = "align: {target: self_flow}\nalign2: {target: vae_latent, latent: mean}"
    file = write(tmp_path / "two.yaml", text)
    cfg, _ = parse_train(["--config", file, "--align2.weight", "0.5"])
    assert type(cfg.align2) is TARGETS["vae_latent"].config
    assert (cfg.align2.latent, cfg.align2.weight, cfg.align.weight) == ("mean", 0.5, 0.8)
    assert list(cfg.alignments) == ["align", "align2"]
    save_config(cfg, tmp_path / "saved.yaml")
    assert read_config(tmp_path / "saved.yaml") == cfg
    off, _ = parse_train(["--config", file, "--align2", "none"])
    assert list(off.alignments) == ["align"] and off.align2.latent == "mean"
    with pytest.raises(SystemExit):
        parse_train(["--align2", "self_flow", "--align2.latent", "mean"])
    assert "align2.latent" in capsys.readouterr().err


def test_the_distances_are_those_of_the_operator():
    assert get_args(Distance) == KINDS


def test_one_target_is_the_default():
    cfg, _ = parse_train([])
    assert list(cfg.alignments) == ["align"] and cfg.align.target == "ema_teacher"
    assert cfg.align2 == AlignConfig(target="none")


def test_options_of_a_file_for_another_target_are_left_out(tmp_path, caplog):
    """lambda, schedule and distance of one method would be a wrong choice for another."""
    text = "align: {target: ema_teacher, weight: 0.2, schedule: epochs, teacher_layer: 4}\n"
    file = write(tmp_path / "sra.yaml", text + "model: {name: SiT-B/2}")
    cfg, _ = parse_train(["--config", file, "--align", "dual_time", "--align.t_max", "0.1"])
    expected = TARGETS["dual_time"].config(t_max=0.1)
    assert cfg.align == expected and cfg.model.name == "SiT-B/2"
    assert "its options of ema_teacher are left out, the target is dual_time" in caplog.text


def test_files_for_two_targets(tmp_path):
    """The last one names the target, and its options are taken."""
    first = write(tmp_path / "a.yaml", "align: {target: ema_teacher, weight: 0.1, t_max: 0.3}")
    second = write(tmp_path / "b.yaml", "align: {target: layer_sync, deep_layer: 5}")
    cfg, _ = parse_train(["--config", first, "--config", second])
    assert cfg.align == TARGETS["layer_sync"].config(deep_layer=5)
    # a name by itself is a short form
    third = write(tmp_path / "c.yaml", "align: self_flow\nalign2: vae_latent")
    cfg, _ = parse_train(["--config", first, "--config", third])
    assert cfg.align == TARGETS["self_flow"].config()
    assert cfg.align2 == TARGETS["vae_latent"].config()


@pytest.mark.parametrize("text, args", [("", "--align2.weight 0.3"), ("align2: {every: 2}", "")])
def test_options_of_no_second_target_are_refused(tmp_path, capsys, text, args):
    file = write(tmp_path / "two.yaml", text or "{}")
    with pytest.raises(SystemExit) as stopped:
        parse_train(["--config", file, *args.split()])
    assert stopped.value.code == 2
    assert (
        "options of align2 are given, and align2.target names no target" in capsys.readouterr().err
    )
