import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples/dit_block.py"


def test_fused_block_is_the_plain_one(device, monkeypatch):
    """With the kernels, not only with the references that a CPU takes by itself."""
    compare = runpy.run_path(str(EXAMPLE))["compare"]
    for backend in ("torch", "triton"):
        monkeypatch.setenv("SRA_FAST_BACKEND", backend)
        assert compare(device) < 1e-4
