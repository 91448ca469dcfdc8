"""Phases follow the clock they are given, kernels fall into their families, the host's time excludes the device's."""

import pytest
import torch

from benchmarks.step import cpu_overhead, phases
from benchmarks.step.kernel_families import family, idle_time

KERNELS = {
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
}


@pytest.mark.parametrize("kernel, expected", KERNELS.items())
def test_families_of_kernels(kernel, expected):
    assert family(kernel) == expected


class FakeClock:
    """Stands for the host's clock; time passes only when it is spent."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(phases.time, "perf_counter", lambda: self.now)

    def spend(self, seconds: float) -> None:
        self.now += seconds


class FakeStep:
    """A step of 15 seconds and one more per step number, in phases."""

    def __init__(self, clock: FakeClock):
        self.clock = clock

    def teacher(self, seconds):
        self.clock.spend(seconds)

    def forward(self, seconds):
        self.clock.spend(seconds)

    def update(self, seconds):
        self.clock.spend(seconds)

    def run(self, i):
        self.clock.spend(1)
        self.forward(2 + i)
        self.update(4)
        # after the optimizer, to the end of the step
        self.clock.spend(8)


def test_phases_follow_the_clock(monkeypatch):
    step = FakeStep(FakeClock(monkeypatch))
    assert phases.time_steps(step.run, range(2), cuda=False) == [15e3, 16e3]

    # the teacher runs inside the forward pass
    forward = step.forward
    step.forward = lambda seconds: (forward(seconds), step.teacher(0.5))
    timed = phases.Phases(cuda=False)
    timed.around(step, "teacher", "teacher")
    timed.around(step, "forward", "forward")
    timed.around(step, "update", "optimizer")
    means = timed.measure(step.run, range(3))
    assert means == {"teacher": 500.0, "forward": 3e3, "optimizer": 12e3}


def test_host_time_does_not_wait_for_the_device(monkeypatch):
    """A step that returns after 5 ms, on a device that is busy for 50 ms more."""
    clock = FakeClock(monkeypatch)
    calls = []

    def wait():
        calls.append("wait")
        clock.spend(0.05)

    def step(i):
        calls.append("step")
        clock.spend(0.005)

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    assert phases.time_host(step, range(3)) == pytest.approx([5.0] * 3)
    assert calls == ["wait", "step"] * 3


@pytest.mark.parametrize("sra, ratio, code", [(2.5, "1.250", 0), (3.0, "1.500", 1)])
def test_cpu_overhead_compares_processor_time_step_by_step(sra, ratio, code, monkeypatch, capsys):
    seconds = {"plain": 2.0, "sra": sra}
    order = []
    now = 0.0

    class Step:
        def __init__(self, variant):
            self.name = variant.name

        def step(self, i):
            nonlocal now
            order.append(self.name)
            now += seconds[self.name]
            # a disturbance of one pair does not change the median
            now += 50 if i == 2 else 0

    monkeypatch.setattr(cpu_overhead, "make_step", lambda variant, *rest: Step(variant))
    monkeypatch.setattr(cpu_overhead, "init_distributed", lambda: None)
    monkeypatch.setattr(cpu_overhead.time, "process_time", lambda: now)
    assert cpu_overhead.main(["--model", "SiT-S/8", "--steps", "3"]) == code
    assert order == ["plain", "sra"] * 4
    assert f"time: {ratio} (pairs" in capsys.readouterr().out


def test_time_in_which_no_kernel_runs():
    assert idle_time([]) == 0
    # unordered, overlapping, nested, touching
    assert idle_time([(10, 20), (0, 5), (15, 30), (16, 17), (30, 31), (40, 41)]) == 5 + 9
