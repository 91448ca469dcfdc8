"""Samples of a model of text: prompts of a user, captions of a data set, and what is refused."""

import hashlib
import json
import logging
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from launch import call, error_of
from PIL import Image
from toy_data import write_images, write_text_encoder

from sra_fast.checkpoint.load_model import load_model
from sra_fast.config.cli import make_parser, parse, parse_train
from sra_fast.config.schema import DataConfig, SampleConfig
from sra_fast.data.dataset import open_data
from sra_fast.data.text_encoders import load_text_encoders
from sra_fast.models import SiT
from sra_fast.plots import report
from sra_fast.sampling import parts as parts_of
from sra_fast.sampling import prompts as of_prompts
from sra_fast.sampling import run as script
from sra_fast.sampling.conditions import conditions_like, conditions_of, generate_for, spread
from sra_fast.sampling.prompts import EncodedPrompts, choose_encoders, read_prompts
from sra_fast.training.plan import make_run_plan
from sra_fast.training.run import run as whole_run
from sra_fast.zero.process_group import init_distributed

pytestmark = [
    pytest.mark.usefixtures("rooms"),
    pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers"),
]
TRAIN = (
    "--model.name MMDiT-S/4 --model.hidden_size 32 --model.depth 2 --model.num_heads 2 "
    "--align none --data.num_workers 0 --train.global_batch 4 --train.steps 2 "
    "--train.precision fp32 --train.log_every 1 --optim.lr 0.01 --sample.method euler "
    "--sample.steps 1 --monitor.every 2 --monitor.count 4 --monitor.held_out 3"
).split()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Twelve images of 8 px with captions, three of them held out; a run on them that has looked at
    its weights; its encoder, and another one.
    """
    for room in ("alignment", "data", "diffusion", "evaluation"):
        __import__(f"sra_fast.{room}")
    root = tmp_path_factory.mktemp("prompts")
    for name in write_images(root / "images"):
        file = (root / "images" / name).with_suffix(".txt")
        file.write_text(f"{name[0]} picture {name[2]}\nanother one")
    write_text_encoder(root / "clip")
    write_text_encoder(root / "other", seed=3)
    done = call(
        *("preprocess", "--source", root / "images", "--out", root / "data", "--pixels", "true"),
        *("--resolution", 8, "--holdout", 0.25, "--captions", "txt", "--threads", 1),
        *("--text-encoders", root / "clip"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    cfg = parse_train([*TRAIN, "--data", str(root / "data"), "--train.out", str(root / "runs")])[0]
    whole_run(make_run_plan(cfg), init_distributed())
    return root


def test_x(made):
    print([*made.rglob("*")])
