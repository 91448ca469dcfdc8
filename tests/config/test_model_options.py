"""``model.options``: arguments of a model family that no other option sets."""

import json

import pytest
import torch
from tiny_config import config

from sra_fast import models
from sra_fast.config.cli import parse_train, save_config
from sra_fast.config.schema import EXECUTION, ModelConfig, constructor_arguments
from sra_fast.training.checks import check_config
from sra_fast.utils.registry import MODEL_FAMILIES

pytestmark = pytest.mark.usefixtures("rooms")


def options(**given) -> list[str]:
    return ["--model.options", json.dumps(given)]


@pytest.mark.parametrize("name", ["SiT-S/2", "MMDiT-S/2"])
def test_student_and_teacher_have_them(name):
    cfg = parse_train(["--model", name, *options(mlp_ratio=2)])[0]
    cfg.model.fill_in()
    for network in (cfg.model.build(), cfg.model.build_teacher(2)):
        shapes = {tuple(p.shape) for n, p in network.named_parameters() if "mlp.fc1.weight" in n}
        assert shapes == {(768, 384)}
    assert models.arguments_of(cfg.model.build())["mlp_ratio"] == 2
    plain = ModelConfig(name)
    plain.fill_in()
    assert models.arguments_of(plain.build())["mlp_ratio"] == 4


def test_a_teacher_needs_none_of_the_output():
    """DiT's learned variance is no argument of its backbone."""
    cfg = parse_train(["--model", "DiT-S/2", *options(learn_sigma=False)])[0]
    cfg.model.fill_in()
    student = cfg.model.build()
    assert student.out_channels == 4 and not models.arguments_of(student)["learn_sigma"]
    teacher = cfg.model.build_teacher(3)
    assert len(teacher.blocks) == 3 and type(teacher) is models.transformer.ClassBackbone


def test_on_the_command_line_and_in_files(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model:\n  name: SiT-S/2\n  options: {mlp_ratio: 2.5}\n")
    cfg = parse_train(["--config", str(file)])[0]
    assert cfg.model.options == {"mlp_ratio": 2.5}
    assert parse_train(["--model.options.mlp_ratio", "2.5"])[0].model.options == cfg.model.options
    save_config(cfg, tmp_path / "saved.yaml")
    assert parse_train(["--config", str(tmp_path / "saved.yaml")])[0] == cfg


@pytest.mark.parametrize(
    "given, message",
    [
        ({"width": 3}, r"what a SiT has there \(mlp_ratio\), got width"),
        ({"learn_sigma": False}, r"what a SiT has there \(mlp_ratio\), got learn_sigma"),
        ({"depth": 3}, "got depth: it is model.depth"),
        ({"process": 3}, "got process$"),
        ({1: 2}, "got 1$"),
        # how a network runs is decided elsewhere
        ({"recompute": "full"}, "got recompute"),
        ({"mlp_ratio": True}, "options.mlp_ratio: expected a number, got True"),
        ({"mlp_ratio": "wide"}, "options.mlp_ratio: expected a number, got 'wide'"),
        ({"mlp_ratio": None}, "options.mlp_ratio: expected a number, got None"),
        ({"mlp_ratio": [3]}, r"options.mlp_ratio: expected a number, got \[3\]"),
        ({"mlp_ratio": float("inf")}, "options.mlp_ratio: expected a finite number, got inf"),
        ({"mlp_ratio": 0}, "an MLP of at least 1 unit, got 0.0"),
        ({"mlp_ratio": -2}, "an MLP of at least 1 unit, got -2.0"),
    ],
)
def test_refused(given, message):
    cfg = config()
    cfg.model.options = given
    with pytest.raises(ValueError, match=message):
        check_config(cfg)


@pytest.mark.parametrize("name", ["SiT", "DiT", "MMDiT"])
def test_every_argument_of_a_family_has_its_place(name):
    """Each can be given, and exports tell it."""
    family = MODEL_FAMILIES[name]
    arguments = set(constructor_arguments(family)) - EXECUTION
    fields = set(ModelConfig.__dataclass_fields__)
    further = {"SiT": {"mlp_ratio"}, "DiT": {"mlp_ratio", "learn_sigma"}, "MMDiT": {"mlp_ratio"}}
    assert arguments - fields == further[name]
    with torch.device("meta"):
        model = models.create_model(f"{name}-S/2")
    assert set(models.arguments_of(model)) == arguments


def test_arguments_that_a_class_hands_on():
    class First:
        def __init__(self, a, *, b=2):
            pass

    class Second(First):
        def __init__(self, *args, c=3, **kwargs):
            super().__init__(*args, **kwargs)

    class Third(Second):
        """No constructor of its own."""

    class Fourth(Second):
        def __init__(self, d):
            super().__init__(d)

    assert list(constructor_arguments(Third)) == ["a", "b", "c"]
    assert list(constructor_arguments(Fourth)) == ["d"]
    assert constructor_arguments(Third)["c"].default == 3
