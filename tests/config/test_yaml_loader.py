"""Options in files and arguments: YAML as it looks, without the traps of YAML 1.1."""

import math

import jsonargparse
import pytest
import yaml
from launch import ROOT

from sra_fast.config.cli import make_parser, parse
from sra_fast.sampling import run as script
from sra_fast.utils.yaml_loader import read_config, write_config

theirs = jsonargparse.get_loader("yaml")


def same(a, b) -> bool:
    """Equal values of equal types: 1, 1.0 and true are different things."""
    return repr(a) == repr(b)


@pytest.mark.parametrize(
    "text, value",
    [
        ("12", 12),
        ("-3", -3),
        ("+3", 3),
        ("0", 0),
        ("0x10", 16),
        ("1_000", 1000),
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("1.5", 1.5),
        ("-1.5e+3", -1500.0),
        (".5", 0.5),
        ("5.", 5.0),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        (".nan", math.nan),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'12'", "12"),
        ('"true"', "true"),
        ("2026-11-29", "2026-11-29"),
        ("SiT-S/2", "SiT-S/2"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("[1, 2.5, no_, null]", [1, 2.5, "no_", None]),
        ("{a: 1, b: {c: .5}}", {"a": 1, "b": {"c": 0.5}}),
        # no mappings to nothing
        ("{a}", "{a}"),
        ("{a, b}", "{a, b}"),
        ("a:", "a:"),
        ("a b:", "a b:"),
        # but these are
        ("a: null", {"a": None}),
        ("{a: null, b: ~}", {"a": None, "b": None}),
        ("a:\nb:\n", {"a": None, "b": None}),
    ],
)
def test_values_are_what_they_look_like(text, value):
    """And what they were with the parser's own loader."""
    assert same(read_config(text), value)
    assert same(theirs(text), value)


@pytest.mark.parametrize(
    "text, value",
    [
        ("010", "010"),
        ("-010", "-010"),
        ("0b10", "0b10"),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        *((word, word) for word in ("yes", "no", "on", "off", "Yes", "NO", "On", "y", "n")),
        # the exponent has no sign
        (".5e3", 500.0),
        ("-2.e3", -2000.0),
        ("-.5", -0.5),
        ("{no: 1, 010: 2}", {"no": 1, "010": 2}),
    ],
)
def test_traps_of_an_older_yaml(text, value):
    assert same(read_config(text), value)


@pytest.mark.parametrize(
    "text, key",
    [
        ("a: 1\nb: 2\na: 1\n", "a"),
        ("x:\n  a: 1\n  b: 2\n  b: 3\n", "b"),
        ("{a: 1, a: 2}", "a"),
        ("x: [{b: {c: 1, c: 1}}]", "c"),
        ("{1: a, 1: b}", "1"),
        ("'a': 1\na: 2\n", "a"),
        ("x: &x {a: 1}\ny: {<<: *x, b: 1, b: 2}\n", "b"),
    ],
)
def test_a_key_that_is_there_twice_is_named(text, key):
    with pytest.raises(yaml.YAMLError, match=f"{key} is there twice"):
        read_config(text)


def test_merged_keys_may_be_replaced():
    common = "common: &c {a: 1, b: 2}\n"
    assert read_config(common + "x: {<<: *c, b: 3}")["x"] == {"a": 1, "b": 3}
    assert read_config(common + "x: {b: 3, <<: *c}")["x"] == {"a": 1, "b": 3}
    several = "other: &o {b: 5, d: 4}\nx: {<<: [*c, *o]}"
    assert read_config(common + several)["x"] == {"a": 1, "b": 2, "d": 4}
    # what is merged has merged keys itself, and lies deeper
    nested = "outer:\n  inner: &i\n    <<: *c\n    b: 3\nx: {<<: *i, d: 4}"
    read = read_config(common + nested)
    assert read["x"] == {"a": 1, "b": 3, "d": 4}
    assert read["outer"]["inner"] == {"a": 1, "b": 3}


TEXTS = (
    "1e-3 1e3 1E5 -.5e3 1. 0o7 0x1f 010 0b10 1_000 12 -3 12:30 2026-11-29 .inf -.Inf .nan yes no "
    "on off y null ~ true FALSE {a} [a] #x &a !x %a = << - --- é 😀"
).split(" ") + ["", " ", "a: b", "a #b", "two\nlines", "a:"]
VALUES = (1e-08, 1e-4, 1e22, -0.0, math.inf, -math.inf, math.nan, 0, -5, 10**20, True, False, None)


@pytest.mark.parametrize("value", [*TEXTS, *VALUES], ids=repr)
def test_what_is_written_reads_back(value):
    """Equal and of the same type, as a value, in a list and as a name."""
    held = {"x": value, "several": [value], "names": {value: 1}}
    assert same(read_config(write_config(held)), held)
    # people read and change the file
    assert same(read_config(write_config(held, allow_unicode=True)), held)


def test_shipped_files_read_the_same():
    paths = sorted(ROOT.glob("configs/**/*.yaml"))
    assert len(paths) > 10
    for path in paths:
        text = path.read_text()
        assert same(read_config(text), theirs(text)), path


def classes(argument: str, names: list[str]) -> list[int]:
    args = ["--checkpoint", "x", "--out", "x", "--classes", argument]
    asked = parse(script.Options, make_parser(script.Options, ""), args)[0].classes
    return script.class_numbers(asked, len(names), names)


def test_class_names_of_digits_are_names():
    names = [f"{number:03d}" for number in range(12)]
    assert classes("[010]", names) == [10]
    assert classes("[010, 003, 11, '007']", names) == [10, 3, 11, 7]


def test_class_names_that_were_booleans():
    assert classes("[no, yes]", ["maybe", "no", "yes"]) == [1, 2]
    assert classes("[off, 0]", ["off", "on"]) == [0, 0]
