"""What a step consists of: FLOPs and bytes, counted while it runs on the CPU, its phases and its families of kernels."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import counting  # noqa: E402
import overhead  # noqa: E402
import phases  # noqa: E402
import registry  # noqa: E402
from step_case import make_step  # noqa: E402
from variants import Variant  # noqa: E402

from sra_fast import ops  # noqa: E402
from sra_fast.training.logger import training_flops  # noqa: E402
from sra_fast.zero.process_group import init_distributed  # noqa: E402

BATCH = 2


NARROW = "+model.hidden_size=64+model.num_heads=2"


def small(name: str, *case):
    variant = Variant.parse(name if case else name + NARROW)
    return variant, variant.configuration(*(case or ("SiT-S/4", 64, BATCH, "cpu")))


@pytest.fixture
def device(monkeypatch):
    """One process; the environment that says so is taken back."""
    for name in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    return init_distributed()


@pytest.mark.parametrize("name, full_depth", [
    ("plain", False), ("sra", False), ("sra+align.teacher_layer=12", False), ("sra+align.fraction=0.5", False),
    ("truncated", False), ("bf16_teacher", True),
])  # fmt: skip
def test_a_step_does_what_the_formula_says(name, full_depth, device, monkeypatch):
    # as products: the counter does not know the CPU's flash attention
    monkeypatch.setenv("SRA_FAST_ATTENTION", "math")
    variant, cfg = small(name)
    run, expected = make_step(variant, cfg, device, None), counting.step_flops(cfg, full_depth)
    with FlopCounterMode(display=False) as counter:
        run.step(0)
    # without alignment the head sees one token, whose input needs no gradient: every parameter gets a (zero) gradient
    spare = 2.5 * counting.parts(cfg)["head"] / 4 if name == "plain" else 0
    assert counter.get_total_flops() == BATCH * sum(expected.values()) + spare
    if full_depth or cfg.align.fraction < 1 or not expected["teacher"]:
        return
    # the layers' share of the blocks, exactly; what the teacher needs besides are the embedders
    p = counting.parts(cfg)
    assert (expected["teacher"] - p["embed"]) * 12 == cfg.align.teacher_layer * (12 * p["block"])
    assert p["embed"] < 0.03 * expected["teacher"]


def test_flops_of_the_papers_models():
    """Times plain, 2 FLOP per multiply-add: what the design rests on, and what MFU is reported with."""
    found = {}
    for name, full_depth in {"plain": False, "sra": False, "fp32_teacher": True}.items():
        _, cfg = small(name, "SiT-XL/2", 256, 1, "cuda")
        found[name] = sum(counting.step_flops(cfg, full_depth).values())
        if not full_depth:
            # MFU's count takes three passes of everything
            assert found[name] == pytest.approx(training_flops(cfg)[name == "sra"], rel=1e-4)
    assert found["plain"] == pytest.approx(711.7e9, rel=1e-4)
    assert found["sra"] / found["plain"] == pytest.approx(1.250, abs=5e-4)
    assert found["fp32_teacher"] / found["plain"] == pytest.approx(1.345, abs=5e-4)
    plain, sra = (
        sum(counting.step_flops(small(name, "SiT-S/2", 256, 1, "cpu")[1]).values())
        for name in ("plain", "sra")
    )
    assert sra / plain < 1.25


def test_bytes_of_known_operators():
    n = 1000
    a, b, half = torch.randn(n), torch.rand(n), torch.zeros(n, dtype=torch.bfloat16)
    m, v, steps = torch.zeros(n), torch.zeros(n), [torch.ones(())]
    numbers = dict(
        lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False
    )
    calls = {
        8: lambda: torch._foreach_mul_([a], 0.5),
        12: lambda: a.lerp_(b, 0.5),
        6: lambda: torch._foreach_copy_([half], [a]),
        28: lambda: torch._fused_adamw_([a], [b], [m], [v], [], steps, **numbers),
        0: lambda: (a.view(10, 100).transpose(0, 1)[3], torch.empty(n), a.detach()),
        4: lambda: torch.linalg.vector_norm(a),
    }
    for per_element, call in calls.items():
        with counting.count_bytes() as counter:
            call()
        # single numbers, such as the norm or the step, are bytes too
        assert per_element * n <= counter.total <= per_element * n + 8


def test_bytes_of_the_update_against_the_kernel(device):
    N, make = registry.num_parameters(registry.Shape("tiny")), registry.ENTRIES["adamw_ema_"].make
    (*buffers, weights, ema, copy), *_ = make(
        registry.Shape("tiny"), torch.bfloat16, registry.random(0, "cpu")
    )
    with counting.count_bytes() as counter:
        ops.adamw_ema_(*buffers, 1, lr=0.1, weights=weights, ema=ema, ema_copy=copy)
    assert (
        counter.total
        == registry.ENTRIES["adamw_ema_"].bytes(registry.Shape("tiny"), 2)[0]
        == 40 * N
    )

    def per_parameter(name):
        variant, cfg = small(f"{name}+train.precision=bf16+align.teacher_layer=12")
        run = make_step(variant, cfg, device, None)
        N = sum(p.numel() for p in cfg.model.build().parameters())
        return {phase: total / N for phase, total in counting.bytes_by_phase(run).items()}

    # bf16 gradients: norm 2, then the one pass: 38 with the teacher's copy of all but head and final layer
    found = per_parameter("sra")
    assert 39.5 < found["optimizer"] < 40
    # without DeepSpeed's bucket, division and copies of gradients that one process has already
    assert per_parameter("sra+optim.implementation=torch")["backward"] - found[
        "backward"
    ] == pytest.approx(16, abs=0.1)
    # gradients lie flat already, the teacher's copy is a pass of its own: 2, 36 and 6
    assert 43.5 < per_parameter("sra+train.zero_stage=3")["optimizer"] < 44
    # norm 4, clip 8, AdamW 28, EMA 12, teacher's copy 6 of all but head and final layer
    strong = per_parameter("strong+compile=no")["optimizer"]
    assert 57 < strong < 58
    # AdamW in passes of its own, the EMA in two
    assert per_parameter("truncated")["optimizer"] == pytest.approx(
        strong - 28 - 12 + 76 + 20, abs=0.1
    )


@pytest.mark.parametrize("kernel, expected", {
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>(Params)": "matmul",
    "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NTT": "matmul",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<96, 128, 64, 4, cutlass::bfloat16_t>>": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x128x128_4x1x1_kernel0_0": "attention",
    "triton_red_fused__to_copy_add_mul_native_layer_norm_3": "compiled",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
    "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "communication",
    "Memcpy DtoD (Device -> Device)": "copy",
    "_adamw_ema_kernel": "ours: _adamw_ema_kernel",
    "void at::native::vectorized_elementwise_kernel<4, at::native::SiLU>": "other",
}.items())  # fmt: skip
def test_families_of_kernels(kernel, expected):
    assert phases.family(kernel) == expected


def test_phases_follow_the_clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(phases.time, "perf_counter", lambda: now[0])

    class Step:
        def spend(self, seconds):
            now[0] += seconds

        teacher = forward = update = spend

        def run(self, i):
            self.spend(1)
            self.forward(2 + i)
            self.update(4)
            self.spend(8)

    step = Step()
    assert phases.time_steps(step.run, range(2), cuda=False) == [15e3, 16e3]
    clock, inner = phases.Phases(cuda=False), step.forward
    step.forward = lambda seconds: (inner(seconds), step.teacher(0.5))
    for place in (
        (step, "teacher", "teacher"),
        (step, "forward", "forward"),
        (step, "update", "optimizer"),
    ):
        clock.around(*place)
    assert clock.measure(step.run, range(3)) == {
        "teacher": 500.0,
        "forward": 3e3,
        "optimizer": 12e3,
    }  # means


@pytest.mark.parametrize("sra, ratio, code", [(2.5, "1.250", 0), (3.0, "1.500", 1)])
def test_overhead_compares_processor_time_step_by_step(sra, ratio, code, monkeypatch, capsys):
    now, order = [0.0], []

    class Step:
        def __init__(self, variant):
            self.name = variant.name

        def step(self, i):
            order.append(self.name)
            # a disturbance of one step does not count
            now[0] += {"plain": 2.0, "sra": sra}[self.name] + 50 * (i == 2)

    monkeypatch.setattr(overhead, "make_step", lambda variant, *rest: Step(variant))
    monkeypatch.setattr(overhead, "init_distributed", lambda: None)
    monkeypatch.setattr(overhead.time, "process_time", lambda: now[0])
    assert overhead.main(["--model", "SiT-S/8", "--steps", "3"]) == code
    assert order == ["plain", "sra"] * 4 and f"time: {ratio} (pairs" in capsys.readouterr().out
