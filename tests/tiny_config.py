"""A configuration that trains in seconds on a CPU: four blocks of width 32 on the digits."""

from pathlib import Path

from sra_fast.config.cli import parse_train
from sra_fast.config.schema import Config

TINY = (
    "--model.name SiT-S/2 --model.input_size 8 --model.in_channels 1 --model.num_classes 10 "
    "--model.hidden_size 32 --model.depth 4 --model.num_heads 2 "
    "--align.student_layer 2 --align.teacher_layer 3 --data.name digits --train.global_batch 8"
).split()


def config(*args: str) -> Config:
    """The tiny configuration with further arguments of ``train.py``."""
    return parse_train([*TINY, *args])[0]


def read_config(path: Path) -> Config:
    """The configuration that ``save_config`` has written."""
    return parse_train(["--config", str(path)])[0]
