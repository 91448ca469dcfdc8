"""The CUDA extension: built with nvcc where it exists; its CPU reference and its device code, run
on host memory.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from codegen import ROOT, _tool

from sra_fast.ops.ema_update import ema_update_, ema_update_ref_

module = sys.modules["sra_fast.ops.ema_update"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build(folder: Path, **env) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder),
    ]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    for tool in ("pybind11", "setuptools"):
        pytest.importorskip(tool)
    if not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        pytest.skip("needs nvcc")
    folder = tmp_path_factory.mktemp("csrc")
    done = build(folder, SRA_FAST_BUILD_EXT="1")
    assert done.returncode == 0, done.stderr[-4000:]
    (path,) = (folder / "sra_fast").glob("_ema_cuda*.so")
    return path


@pytest.fixture(scope="session")
def extension(library):
    spec = importlib.util.spec_from_file_location("sra_fast._ema_cuda", library)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(params=["reference", "emulated"])
def installed(request, extension, monkeypatch):
    """sra_fast sees the extension; host tensors run its CPU reference, or its device code thread by
    thread.
    """
    run = (
        extension.ema_update_cpu if request.param == "reference" else extension.ema_update_emulated
    )
    seen = SimpleNamespace(
        DType=extension.DType, ema_update_cpu=run, ema_update=extension.ema_update
    )
    monkeypatch.setattr(module, "_ema_cuda", seen)
    return extension


def make(shapes, dtypes, device, offset=0):
    torch.manual_seed(0)
    flat = [torch.randn(offset + torch.Size(s).numel(), device=device) for s in shapes]
    ema = [x[offset:].view(s) for x, s in zip(flat, shapes, strict=True)]
    params = [
        torch.randn(s, device=device).to(dtypes[i % len(dtypes)]) for i, s in enumerate(shapes)
    ]
    return ema, params


def launch_extension(*arguments, direct=False):
    """What the operator does on a GPU; it refuses host tensors, but the extension is compared on
    them.
    """
    plan = module._make_plan(*arguments[:3])
    # what is planned in the first call is used in the second
    for _ in range(2 if direct else 1):
        module._launch(*arguments, extension=True, plan=plan, direct=direct)


def check(ema, params, decay, copies=None):
    truth = [e.double() for e in ema]
    ema_update_ref_(truth, [p.double() for p in params], decay)
    if ema[0].is_cuda:
        ema_update_(ema, params, decay, copies, backend="cuda")
    else:
        launch_extension(ema, params, copies or [], decay)
    for e, t in zip(ema, truth, strict=True):
        torch.testing.assert_close(e.double(), t, rtol=3e-7, atol=3e-7)
    for c, e in zip(copies or [], ema if copies else [], strict=True):
        assert torch.equal(c, e.to(c.dtype))


SHAPES = [(4096,), (3, 2999), (), (0, 4), (5,), (8192,), (1152,)]


@pytest.mark.parametrize("copy", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("decay", [0.9999, 0.3])
def test_update(installed, decay, copy, device):
    ema, params = make(SHAPES, list(DTYPES.values()), device)
    copies = [torch.full_like(e, float("nan"), dtype=DTYPES[copy]) for e in ema] if copy else None
    check(ema, params, decay, copies)


def test_a_planned_call_does_the_same(installed, device):
    """Twice, with the addresses of the first call; beside a tensor that the reference takes."""
    ema, params = make(SHAPES, list(DTYPES.values()), device)
    params[1] = params[1].t().contiguous().t()
    copies = [torch.zeros_like(e, dtype=torch.bfloat16) for e in ema]
    same = [e.clone() for e in ema]
    same_copies = [c.clone() for c in copies]
    for _ in range(2):
        ema_update_ref_(same, params, 0.7, same_copies)
    if ema[0].is_cuda:
        for _ in range(2):
            ema_update_(ema, params, 0.7, copies, backend="cuda")
    else:
        launch_extension(ema, params, copies, 0.7, direct=True)
    for e, s in zip(ema, same, strict=True):
        torch.testing.assert_close(e, s, rtol=3e-7, atol=3e-7)
    for c, e in zip(copies, ema, strict=True):
        assert torch.equal(c, e.to(c.dtype))


def test_misaligned_tensors(installed, device):
    """Addresses off by one element take the narrow path, and the neighbours stay as they were."""
    ema, params = make([(4096,), (4100,), (9000,)], [torch.bfloat16], device, offset=1)
    before = [e._base[0].item() for e in ema]
    check(ema, params, 0.5)
    assert [e._base[0].item() for e in ema] == before


def test_more_tensors_than_one_table_holds(installed, device):
    """Empty tensors at the seams included: three tables, tensors of zero to three chunks."""
    numels = [
        (37 * i) % 5000 if i % 7 else (i % 3) * installed.CHUNK
        for i in range(2 * installed.MAX_TENSORS + 3)
    ]
    ema, params = make([(n,) for n in numels], [torch.bfloat16], device)
    check(ema, params, 0.9, [torch.zeros_like(e, dtype=torch.bfloat16) for e in ema])


def test_bad_arguments_are_refused(extension):
    none = extension.DType.none
    bf16 = extension.DType.bfloat16
    for run in (extension.ema_update_cpu, extension.ema_update_emulated):
        with pytest.raises(ValueError, match="as many params"):
            run([0, 0], [0], [], [0, 0], bf16, none, 0.9)
        with pytest.raises(ValueError, match="as many params"):
            run([0], [0], [], [0], bf16, bf16, 0.9)
        with pytest.raises(ValueError, match="expected params of"):
            run([0], [0], [], [0], none, none, 0.9)


def cuobjdump(*args) -> str:
    return subprocess.run(
        [_tool("cuobjdump"), *args], check=True, capture_output=True, text=True
    ).stdout


def test_machine_code(library):
    """9 kernels (3 dtypes of p, 3 of the copy) for each architecture: no stack, few registers,
    128-bit accesses.
    """
    usage = cuobjdump("--dump-resource-usage", library)
    parts = re.split(r"arch = sm_(\d+)", usage)[1:]
    for arch in ("80", "90", "100"):
        part = "".join(
            body for name, body in zip(parts[::2], parts[1::2], strict=True) if name == arch
        )
        rows = re.findall(
            r"Function (\S*ema_kernel\S*):\s+REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)", part
        )
        assert len(rows) == 9, usage[:2000]
        for name, registers, stack, local in rows:
            assert (int(stack), int(local)) == (0, 0) and int(registers) <= 64, (
                arch,
                name,
                registers,
                stack,
            )
    sass = cuobjdump("-sass", "-arch", "sm_90", library)
    bodies = sass.split("Function :")[1:]
    assert len(bodies) == 9
    for body in bodies:
        wide = Counter(re.findall(r"\b(LDG|STG)\.E\.128", body))
        # two vectors of 8: 4 loads of fp32 and 2 or 4 of p; at least 4 stores (once per branch of
        # the lerp)
        assert wide["LDG"] in (6, 8) and wide["STG"] >= 4, (body[:200], wide)


def test_missing_extension_is_said(monkeypatch):
    monkeypatch.setattr(module, "_ema_cuda", None)
    with pytest.raises(RuntimeError, match="^ema_update_: .*SRA_FAST_BUILD_EXT=1"):
        module._choose(SimpleNamespace(is_cuda=True), "cuda")


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("asked", ["argument", "variable"])
def test_host_tensors_are_refused(built, asked, monkeypatch):
    """Also where the extension is built: its CPU reference is for comparisons."""
    monkeypatch.setattr(module, "_ema_cuda", object() if built else None)
    monkeypatch.setenv("SRA_FAST_BACKEND", "cuda")
    ema = [torch.ones(2)]
    with pytest.raises(ValueError, match="^ema_update_: backend='cuda' needs CUDA .* got cpu$"):
        ema_update_(ema, [torch.zeros(2)], 0.5, backend="cuda" if asked == "argument" else None)
    assert torch.equal(ema[0], torch.ones(2))


def test_asking_for_it_without_nvcc_is_said(tmp_path):
    pytest.importorskip("setuptools")
    done = build(tmp_path, SRA_FAST_BUILD_EXT="1", PATH="/usr/bin:/bin", CUDA_HOME="/nonexistent")
    assert done.returncode == 0 and "no nvcc" in done.stderr
    assert not list(tmp_path.rglob("*.so"))
