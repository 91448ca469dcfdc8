"""Names of variants: what they stand for, and which are refused."""

import os
from dataclasses import fields

import pytest

from benchmarks.record import VARIABLES
from benchmarks.step import train_step
from benchmarks.step.measure_case import environment_of
from benchmarks.step.torch_program import ADAMW
from benchmarks.step.variants import (
    FEATURE_WIDTH,
    OF_PYTORCH,
    OTHER_TARGETS,
    WORDS,
    Switches,
    Variant,
    expand,
    is_depth,
    layers,
    teacher_share,
)
from sra_fast.utils.registry import TARGETS


@pytest.mark.parametrize(
    "words, message",
    [
        ("fastest", "expected a variant of reference, plain"),
        ("reference", "needs --published PATH"),
        ("strong+speed=9", "variant strong has no switch speed"),
        ("sra+compile=whole", "variant sra has no switch compile"),
        ("sra+train.compile", "expected settings name=value"),
        ("sra+SRA_FAST_CUBLSLT=0", "its variables are SRA_FAST_BACKEND,"),
        ("strong+SRA_FAST_BACKEND=triton", "no switch SRA_FAST_BACKEND"),
        ("strong+compile=layers", "expected compile to be no or blocks or whole, got 'layers'"),
        ("strong+compile=true", "expected compile to be no or blocks or whole, got 'true'"),
        ("strong+graph=False", "expected graph to be true or false, got 'False'"),
        ("truncated+ema=all", "expected ema to be each or foreach, got 'all'"),
        ("strong+align.target=dual_time", "variant strong runs SRA and nothing else"),
        ("strong+align2.target=vae_latent", "variant strong runs SRA and nothing else"),
    ],
)
def test_unknown_variants_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        train_step.parse(["--variants", words])
    assert message in capsys.readouterr().err


def test_layers_are_the_papers():
    """Student layer, teacher layer, depth."""
    assert layers("SiT-XL/2") == (8, 20, 28)
    assert layers("DiT-B/4") == (3, 7, 12)


def test_the_ladder_starts_with_the_published_code_where_there_is_a_checkout():
    assert expand(["ladder"], "SiT-XL/2", True)[0] == "reference"
    without = expand(["plain", "ladder", "plain"], "SiT-XL/2", False)
    assert without[:2] == ["plain", "fp32_teacher"]
    assert without[-2:] == ["fp8", "plain"]
    assert "reference" not in without


def test_depths_of_the_teacher():
    names = expand(["depths"], "SiT-XL/2", False)
    assert names[0] == "sra+align.teacher_layer=7"
    assert [teacher_share(name, "SiT-XL/2") for name in names] == [0.25, 0.5, 0.75, 1.0]
    assert all(map(is_depth, names))
    assert not is_depth("sra+align.teacher_layer=7+align.every=2")
    # the student's layer may not lie above the teacher's
    cfg = Variant.parse(names[0]).configuration("SiT-XL/2", 512, 8, "cuda")
    assert (cfg.align.student_layer, cfg.align.teacher_layer) == (7, 7)
    assert cfg.model.input_size == 64


def test_options_reach_the_engine():
    cfg = Variant.parse("fp8+train.compile=false").configuration("SiT-XL/2", 256, 8, "cuda")
    assert cfg.align.teacher_dtype == "fp8"
    assert cfg.train.graph
    assert not cfg.train.compile
    assert cfg.train.precision == "bf16"
    assert Variant.parse("plain").configuration("SiT-B/2", 256, 8, "cpu").align.target == "none"


def test_every_target_is_a_variant():
    assert {"none", "ema_teacher", *OTHER_TARGETS} == set(TARGETS)


@pytest.mark.parametrize(
    "name, expected",
    [
        # those with a teacher at SRA's layers, the others at their own
        ("self_flow", {"student_layer": 8, "teacher_layer": 20, "weight": 0.8}),
        ("self_flow+align.teacher_dtype=fp8", {"teacher_layer": 20, "teacher_dtype": "fp8"}),
        ("self_flow+align.teacher_layer=5", {"student_layer": 5, "teacher_layer": 5}),
        ("dual_time+align.full_share=0.25", {"teacher_layer": 20, "full_share": 0.25}),
        ("vae_latent", {"student_layer": 8}),
        ("layer_sync", {"student_layer": 8, "deep_layer": 16}),
        ("dispersive", {"student_layer": 7}),
        ("cached_features", {"student_layer": 8, "feature_width": FEATURE_WIDTH}),
        ("sra+align.target=dispersive", {"student_layer": 7}),
    ],
)
def test_options_of_a_target(name, expected):
    align = Variant.parse(name).configuration("SiT-XL/2", 256, 8, "cpu").align
    assert {field: getattr(align, field) for field in expected} == expected


def test_a_second_target():
    name = "self_flow+align2.target=cached_features+align2.feature_width=384"
    cfg = Variant.parse(name).configuration("SiT-B/2", 256, 8, "cpu")
    assert list(cfg.alignments) == ["align", "align2"]
    assert (cfg.align.teacher_layer, cfg.align2.student_layer) == (8, 4)
    assert cfg.align2.feature_width == 384


@pytest.mark.parametrize(
    "name, backend, attention",
    [
        # rivals without our kernels; only the best one measures attention's backends, as the engine does
        ("swap_ema", "torch", "sdpa"),
        ("strong", "torch", "auto"),
        ("fused_ops", None, "auto"),
        ("sra", None, None),
        ("reference", None, None),
    ],
)
def test_which_kernels_may_run(name, backend, attention):
    environment = Variant.parse(name).environment
    assert environment.get("SRA_FAST_BACKEND") == backend
    assert environment.get("SRA_FAST_ATTENTION") == attention


def test_switches_have_their_values():
    switches = Variant.parse(
        "strong+compile=whole+mode=max-autotune+graph=true+swap=false"
    ).switches
    assert (switches.compile, switches.mode, switches.graph) == ("whole", "max-autotune", True)
    assert switches.swap is False
    # every field is a word, PyTorch's or true or false
    for item in fields(Switches):
        is_word = item.name in WORDS or item.name in OF_PYTORCH
        assert is_word != isinstance(item.default, bool)
        assert item.default in WORDS.get(item.name, (item.default,))
    assert set(WORDS["adamw"]) == set(ADAMW)


def test_variables_of_the_shell_do_not_reach_a_variant(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("OTHER", "kept")
    for name in ("sra", "sra+SRA_FAST_CUBLASLT=0", "strong"):
        variant = Variant.parse(name)
        with environment_of(variant):
            assert {v: os.environ[v] for v in VARIABLES if v in os.environ} == variant.environment
            assert os.environ["OTHER"] == "kept"
        assert os.environ["SRA_FAST_BACKEND"] == "0"


def test_the_engines_environment_can_be_changed():
    variant = Variant.parse("sra+SRA_FAST_CUBLASLT=0+train.compile=true")
    assert variant.environment == {"SRA_FAST_CUBLASLT": "0"}
    assert variant.options == {"train.compile": "true"}
