"""Bad options are one line: which option, in which file, what was expected, what came."""

from typing import get_args, get_type_hints

import pytest

import sra_fast.training.plan  # noqa: F401  (registers what the parser offers)
from sra_fast.config.cli import make_parser, parse, parse_train
from sra_fast.config.schema import Config
from sra_fast.data import options as preprocess
from sra_fast.sampling import run as sampling


def refused(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_train([*args])
    assert stop.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    return error


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--optim.lr", "nan"], "optim.lr: expected a number, got nan"),
        (["--optim.lr=fast"], "optim.lr: expected a number, got fast"),
        (["--model.time_scale", "inf"], "model.time_scale: expected a number or null, got inf"),
        (["--train.steps", "3.5"], "train.steps: expected a whole number, got 3.5"),
        (
            ["--model.num_classes", "ten"],
            "model.num_classes: expected a whole number or null, got ten",
        ),
        (["--train.precision", "fp17"], "train.precision: expected bf16 or fp32, got fp17"),
        (["--train.export", "pub"], "train.export: expected a list, got pub"),
        (["--train.averages", "[1]"], "train.averages: expected options by name, got [1]"),
        (
            ["--data.latent_scale", "a"],
            "data.latent_scale: expected a number or a list of numbers or null, got a",
        ),
        (
            ["--data.latent_scale", "true"],
            "data.latent_scale: expected a number or a list of numbers or null, got true",
        ),
        (
            ["--data.latent_shift", "[0.5, a]"],
            "data.latent_shift: expected a number or a list of numbers or null, got [0.5, 'a']",
        ),
        (
            ["--data.latent_shift", "[[1], [2]]"],
            "data.latent_shift: expected a number or a list of numbers or null, got [[1], [2]]",
        ),
        (["--optim.betas", "[0.9]"], "optim.betas: expected two numbers, got [0.9]"),
        (["--optim.betas", "0.9"], "optim.betas: expected two numbers, got 0.9"),
        (
            ["--train.averages.a.decay", "x"],
            "train.averages.decay: expected a number or null, got x",
        ),
        (["--model", "{name: 3}"], "model.name: expected text, got 3"),
        (["--optim.lr"], "argument --optim.lr: expected one argument"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_wrong_value(capsys, args, line):
    assert refused(capsys, *args) == f"error: {line}\n"


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--train.stps", "3"], "--train.stps, did you mean --train.steps?"),
        (["--optm.lr", "3"], "--optm.lr, did you mean --optim.lr?"),
        # the name is right, the section is another one
        (["--train.lr", "3"], "--train.lr, did you mean --optim.lr?"),
        (["--lr=3"], "--lr, did you mean --optim.lr?"),
        (["--mdel", "SiT-S/2"], "--mdel, did you mean --model?"),
        (["--align2.foreground", "3"], "--align2.foreground"),
        (["--nothing.like.it", "3"], "--nothing.like.it"),
    ],
)
def test_unknown_option(capsys, args, line):
    assert refused(capsys, *args) == f"error: there is no option {line}\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "mdel:\n  name: SiT-S/2\n",
            "there is no option mdel.name in {}, did you mean model.name?",
        ),
        (
            "model:\n  nname: SiT-S/2\n",
            "there is no option model.nname in {}, did you mean model.name?",
        ),
        ("train:\n  steps: many\n", "train.steps in {}: expected a whole number, got many"),
        ("model: [1\n", "{}: line 2, column 1: did not find expected ',' or ']'"),
        (
            "\ttrain:\n  steps: 3\n",
            "{}: line 1, column 1: found character that cannot start any token",
        ),
        (
            "train: {steps: 3}\ntrain: {log_every: 1}\n",
            "{}: line 2, column 1: train is there twice",
        ),
        ("train: {steps: 3, steps: 5}\n", "{}: line 1, column 19: steps is there twice"),
        ("[1, 2]\n", "{}: expected options by section, got '[1, 2]'"),
        ("", "{}: expected options by section, got ''"),
        ("train: 3\nmodel:\n  name: SiT-S/2\n", "train in {}: expected options below it, got 3"),
        ("optim:\n  eps:\n", "optim.eps in {}: expected a number, got None"),
        ("optim: {betas: [0.9, null]}\n", "optim.betas in {}: expected a number, got None"),
        ("train: {loggers: [null]}\n", "train.loggers in {}: expected text, got None"),
        (
            "train:\n  averages:\n    slow:\n",
            "train.averages in {}: expected options by name, got None",
        ),
        (
            "train: {averages: {slow: {decya: 0.9}}}\n",
            "there is no option --train.averages.decya",
        ),
        ("align: {milestones: {3: null}}\n", "align.milestones in {}: expected a number, got None"),
        (
            "align:\ntrain: {steps: 3}\n",
            "align in {}: expected options below it, got None",
        ),
    ],
)
def test_bad_file(capsys, tmp_path, text, line):
    file = tmp_path / "my.yaml"
    file.write_text(text)
    # a good file after it has no part in the message
    args = ["--config", str(file), "--config", "configs/digits.yaml"]
    assert refused(capsys, *args) == f"error: {line.format(file)}\n"


def test_an_empty_value_is_refused_where_none_is_no_value(capsys, tmp_path):
    """Of an option of every type that a section has."""
    file = tmp_path / "my.yaml"
    seen = set()
    for section, options in vars(Config()).items():
        for name, hint in get_type_hints(type(options)).items():
            if str(hint) in seen:
                continue
            seen.add(str(hint))
            file.write_text(f"{section}:\n  {name}:\n")
            if type(None) in get_args(hint):
                found = parse_train(["--config", str(file)])[0]
                assert getattr(getattr(found, section), name) is None
            else:
                said = refused(capsys, "--config", str(file))
                assert said.startswith(f"error: {section}.{name} in {file}: expected ")
                assert said.endswith(", got None\n")


@pytest.mark.parametrize(
    ("options", "text", "line"),
    [
        (
            sampling.Options,
            "checkpoint: a\nsample:\n  steps:\n",
            "sample.steps in {}: expected a whole number, got None",
        ),
        (
            preprocess.Options,
            "source: a\nmirror:\nout:\n",
            "mirror in {}: expected true or false, got None",
        ),
        # what has to be given is missed as before
        (preprocess.Options, "source:\nout: b\n", "the following arguments are required: source"),
    ],
)
def test_an_empty_value_in_a_file_of_another_program(capsys, tmp_path, options, text, line):
    file = tmp_path / "my.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit):
        parse(options, make_parser(options, "A program."), ["--config", str(file)])
    assert capsys.readouterr().err == f"error: {line.format(file)}\n"


def test_a_number_with_a_zero_before_it_is_no_octal_one(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("train: {seed: 010}\nmodel: {name: 010}\n")
    cfg = parse_train([f"--config={file}"])[0]
    assert (cfg.train.seed, cfg.model.name) == (10, "010")
    assert parse_train(["--train.seed", "010"])[0].train.seed == 10


def test_file_that_is_no_text(capsys, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_bytes(b"model: \xff\n")
    assert refused(capsys, f"--config={file}").startswith(f"error: {file}: 'utf-8' codec")


def test_missing_file(capsys, tmp_path):
    file = tmp_path / "none.yaml"
    said = refused(capsys, "--config", str(file))
    assert said == f"error: config: File does not exist: '{file}'\n"


def test_command_line_wins_over_the_file(capsys, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("train:\n  steps: 3\n")
    said = refused(capsys, "--config", str(file), "--train.steps", "many")
    # the file has a right value, which is not to blame
    assert said == "error: train.steps: expected a whole number, got many\n"
