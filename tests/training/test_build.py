"""What ``build`` takes: plans for this process group, targets of every kind."""

import pytest
import torch
from tiny_config import TINY

from sra_fast.alignment.target import Target
from sra_fast.config.cli import parse_train
from sra_fast.training.plan import make_plan
from sra_fast.training.trainer import build
from sra_fast.utils.registry import TARGETS
from sra_fast.zero.process_group import init_distributed


class OwnNetwork(Target):
    """A target that has a network but none of the EMA teacher's options."""

    @classmethod
    def network_depth(cls, align):
        return 2


@pytest.fixture
def own_network():
    TARGETS.register("own_network")(OwnNetwork)
    yield
    TARGETS.remove("own_network")


def test_plan_for_another_number_of_processes_is_refused():
    device = init_distributed()
    cfg, _ = parse_train([*TINY])
    with pytest.raises(ValueError, match="expected a plan for 1 processes, got one for 2"):
        build(make_plan(cfg, world=2), device)


def test_network_of_another_target_follows_in_the_training_precision(own_network):
    device = init_distributed()
    shared = [arg for arg in TINY if arg not in ("--align.teacher_layer", "3")]
    args = [*shared, "--align.target", "own_network", "--train.precision", "bf16"]
    trainer = build(make_plan(parse_train(args)[0]), device)
    assert {p.dtype for p in trainer.engine.module.teacher.parameters()} == {torch.bfloat16}
