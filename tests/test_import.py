"""What importing costs: the operators need torch and triton, nothing else."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENGINE_ONLY = (
    "deepspeed",
    "jsonargparse",
    "yaml",
    "sklearn",
    "scipy",
    "matplotlib",
    "tensorboard",
    "safetensors",
    "PIL",
    "tqdm",
)


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in out.stdout.split()}


def test_sampling_does_not_need_deepspeed():
    assert "deepspeed" not in modules_after(
        "import sra_fast.checkpoint.load_model, sra_fast.sampling.generate, sra_fast.plots.report"
    )


def test_ops_and_models_need_torch_and_triton_only():
    baseline = modules_after("import torch, triton, triton.language")
    added = modules_after("import sra_fast.ops, sra_fast.models") - baseline
    assert {"sra_fast"} <= added
    assert not added & set(ENGINE_ONLY), added
    assert not {
        name for name in added if name not in sys.stdlib_module_names and name != "sra_fast"
    }, added
