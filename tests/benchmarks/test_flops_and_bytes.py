"""FLOPs and bytes of a step, counted while it runs on the CPU, agree with the formulas."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost_model.flops import step_flops
from benchmarks.cost_model.memory_traffic import bytes_by_phase, count_bytes
from benchmarks.operators.registry import OPERATORS
from benchmarks.operators.shapes import TINY, Shape, num_parameters
from benchmarks.step.steps import make_step
from benchmarks.step.variants import Variant
from benchmarks.timing import make_randn
from sra_fast import ops
from sra_fast.alignment.target import AP_HEAD, trained_heads
from sra_fast.config.schema import Config
from sra_fast.training.flops import forward_flops, training_flops
from sra_fast.zero.process_group import init_distributed

BATCH = 2


def small_case(name: str) -> tuple[Variant, Config]:
    """A variant and its configuration for a narrow SiT-S/4."""
    # what is counted are calls, and a replay makes none
    variant = Variant.parse(f"{name}+model.hidden_size=64+model.num_heads=2+train.graph=false")
    return variant, variant.configuration("SiT-S/4", 64, BATCH, "cpu")


def flops_of(name: str, model: str, full_depth: bool = False) -> int:
    """FLOPs per image and step of a model at 256 px."""
    cfg = Variant.parse(name).configuration(model, 256, 1, "cuda")
    return sum(step_flops(cfg, full_depth).values())


@pytest.fixture
def device(monkeypatch):
    """One process; the variables that say so are taken back after the test."""
    for name in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        # set first, so that monkeypatch restores the variable even if it does not exist yet
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    return init_distributed()


@pytest.mark.parametrize(
    "name, full_depth",
    [
        ("plain", False),
        ("sra", False),
        ("sra+align.teacher_layer=12", False),
        ("sra+align.fraction=0.5", False),
        ("truncated", False),
        ("bf16_teacher", True),
        ("self_flow", False),
        ("dual_time+align.fraction=0.5", False),
        ("dual_time+align.full_share=0.5", False),
        ("vae_latent", False),
        ("layer_sync", False),
        ("dispersive", False),
        ("cached_features", False),
        ("cached_features+align.head=conv", False),
        ("self_flow+align2.target=vae_latent", False),
    ],
)
def test_a_step_does_what_the_formula_says(name, full_depth, device, monkeypatch):
    # the counter does not know the CPU's flash attention, but it counts products
    monkeypatch.setenv("SRA_FAST_ATTENTION", "math")
    variant, cfg = small_case(name)
    run = make_step(variant, cfg, device)
    expected = step_flops(cfg, full_depth)
    with FlopCounterMode(display=False) as counter:
        run.step(0)
    spare = 0
    width = cfg.model.hidden_size
    if AP_HEAD not in trained_heads(cfg.alignments.values()):
        # a projection head that no target trains sees one token, whose input needs no gradient, so that
        # every parameter gets a (zero) gradient
        spare += 2.5 * 8 * width**2
    if name == "dispersive":
        # the product of all pairs of images: two of three times, because one factor has no gradient
        tokens = 4
        spare += (2 * BATCH**2 - 3 * BATCH) * 2 * tokens * width
    assert counter.get_total_flops() == BATCH * sum(expected.values()) + spare


def test_parts_of_the_student_and_a_truncated_teacher():
    """Besides its blocks a truncated teacher needs only the embedders."""
    _, cfg = small_case("sra")
    _, deeper = small_case("sra+align.teacher_layer=12")
    depth = 12
    width = cfg.model.hidden_size
    tokens = 4
    part = forward_flops(cfg)
    products = 12 * width**2 * tokens
    modulation = 6 * width**2
    attention = 2 * tokens**2 * width
    block = 2 * (products + modulation + attention)
    assert part["attention"] == depth * 2 * attention
    assert part["modulation"] == depth * 2 * modulation + 2 * 2 * width**2
    # patches of 4 x 4 x 4 and the sinusoid of the time
    assert part["inputs"] == 2 * width * (tokens * 64 + 256)
    last = 2 * width * (2 * width + tokens * 64)
    embed = part["student"] - depth * block - last
    assert embed == part["inputs"] + 2 * width**2
    assert part["align_teacher"] == embed + cfg.align.teacher_layer * block
    assert embed < 0.03 * part["align_teacher"]
    assert forward_flops(deeper)["align_teacher"] == embed + 12 * block


def test_flops_of_the_papers_models():
    """Relative to plain, 2 FLOP per multiply-add: the numbers that the design rests on and MFU uses."""
    plain = flops_of("plain", "SiT-XL/2")
    sra = flops_of("sra", "SiT-XL/2")
    assert plain == pytest.approx(711.7e9, rel=1e-4)
    assert sra / plain == pytest.approx(1.250, abs=5e-4)
    full_depth = flops_of("fp32_teacher", "SiT-XL/2", full_depth=True)
    assert full_depth / plain == pytest.approx(1.345, abs=5e-4)
    assert flops_of("sra", "SiT-S/2") / flops_of("plain", "SiT-S/2") < 1.25

    # MFU counts three passes of everything
    cfg = Variant.parse("sra").configuration("SiT-XL/2", 256, 1, "cuda")
    assert (plain, sra) == pytest.approx(training_flops(cfg), rel=1e-4)


def test_bytes_of_known_operators():
    n = 1000
    a = torch.randn(n)
    b = torch.rand(n)
    half = torch.zeros(n, dtype=torch.bfloat16)
    exp_avg = torch.zeros(n)
    exp_avg_sq = torch.zeros(n)
    steps = [torch.ones(())]

    def adamw():
        torch._fused_adamw_(
            [a],
            [b],
            [exp_avg],
            [exp_avg_sq],
            [],
            steps,
            lr=0.1,
            beta1=0.9,
            beta2=0.99,
            weight_decay=0.1,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )

    # bytes per element to a call
    calls = {
        8: lambda: torch._foreach_mul_([a], 0.5),
        12: lambda: a.lerp_(b, 0.5),
        6: lambda: torch._foreach_copy_([half], [a]),
        28: adamw,
        0: lambda: (a.view(10, 100).transpose(0, 1)[3], torch.empty(n), a.detach()),
        4: lambda: torch.linalg.vector_norm(a),
    }
    for per_element, call in calls.items():
        with count_bytes() as counter:
            call()
        # single numbers, such as the norm or the step, are bytes too
        assert per_element * n <= counter.total <= per_element * n + 8


def test_bytes_of_the_optimizers_pass():
    shape = Shape(TINY)
    operator = OPERATORS["adamw_ema_"]
    flat, *_ = operator.make(shape, torch.bfloat16, make_randn(0, "cpu"))
    param, grad, exp_avg, exp_avg_sq, weights, ema, ema_copy = flat
    with count_bytes() as counter:
        ops.adamw_ema_(
            param,
            grad,
            exp_avg,
            exp_avg_sq,
            1,
            lr=0.1,
            weights=weights,
            ema=ema,
            ema_copy=ema_copy,
        )
    assert counter.total == 40 * num_parameters(shape)
    assert operator.bytes(shape, 2)[0] == counter.total


def test_bytes_of_the_update_in_a_step(device):
    """Per parameter, in bf16, with the teacher's copy of all but the head and the final layer."""

    def per_parameter(name: str) -> dict[str, float]:
        variant, cfg = small_case(f"{name}+train.precision=bf16+align.teacher_layer=12")
        run = make_step(variant, cfg, device)
        N = sum(p.numel() for p in cfg.model.build().parameters())
        return {phase: total / N for phase, total in bytes_by_phase(run).items()}

    # the norm of bf16 gradients 2, the one pass 38
    sra = per_parameter("sra")
    assert 39.5 < sra["optimizer"] < 40
    # DeepSpeed's bucket, division and copies of gradients, which one process does not need
    torch_adamw = per_parameter("sra+optim.implementation=torch")
    assert torch_adamw["backward"] - sra["backward"] == pytest.approx(16, abs=0.1)
    # at ZeRO-3 the teacher's copy is a separate pass: 2, 36 and 6
    assert 43.5 < per_parameter("sra+train.zero_stage=3")["optimizer"] < 44
    # norm 4, clip 8, AdamW 28, EMA 12, the teacher's copy 6
    strong = per_parameter("strong+compile=no")["optimizer"]
    assert 57 < strong < 58
    # AdamW in separate passes 76 instead of 28, the EMA in two passes 20 instead of 12
    truncated = per_parameter("truncated")["optimizer"]
    assert truncated == pytest.approx(strong - 28 - 12 + 76 + 20, abs=0.1)
