"""Break each row kernel on purpose, in a copy of the tree, and see its tests go red.

    python tests/planted_bugs_norm.py [name]      one line per bug; exit status 1 if a bug goes unnoticed

A bug is one replacement in one source file.  Not collected by pytest: each bug costs a test run of several seconds.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS, ADALN, PLAIN, FUSED = (f"kernels/{n}.py" for n in ("_rows", "adaln", "gated_residual", "gated_residual_adaln"))
ATTENTION = "sra_fast/ops/attention.py"
T_ADALN, T_GATED, T_ROWS, T_ATTENTION = (
    f"tests/ops/test_{n}.py" for n in ("adaln", "gated_residual", "rows", "attention")
)

# name, file, what is there, what is put there, tests that must notice
BUGS = [
    ("unmasked variance", ROWS, "x2 = tl.where(cols2 < D, x2 - mean, 0.0)", "x2 = x2 - mean", T_GATED),
    ("unmasked variance, one piece", ROWS, "x = tl.where(cols < D, x - mean, 0.0)", "x = x - mean", T_ADALN),
    (
        "one-pass variance",
        ROWS,
        "rstd = 1.0 / tl.sqrt(tl.sum(fold(x * x, x2 * x2, HEAD, TAIL), axis=0) / D + eps)",
        "y, y2 = x + mean, x2 + mean\n"
        "    rstd = 1.0 / tl.sqrt(tl.sum(fold(y * y, y2 * y2, HEAD, TAIL), axis=0) / D - mean * mean + eps)",
        T_ADALN,
    ),
    ("eps outside the root", ROWS, "/ D + eps)", "/ D) + eps", T_ADALN),
    ("tail left out of the statistics", ROWS, "axis=1) + tail", "axis=1)", T_GATED),
    (
        "norm backward without the mean term",
        ROWS,
        "fold(dxhat, dxhat2, HEAD, TAIL)), axis=0) / D)",
        "c1 * 0.0), axis=0) / D)",
        T_ADALN,
    ),
    ("a mean term for RMS", ROWS, "return tl.sum(c1, axis=0) / D, 0.0", "return tl.sum(c1, axis=0) / D, 0.5", T_ADALN),
    ("first partial sum dropped", ROWS, "for p in range(P):", "for p in range(1, P):", T_GATED),
    ("partial sums of the wrong image", ROWS, "((m * P + p) * K + k) * D", "((m + p) * K + k) * D", T_GATED),
    ("rows past the last token", ROWS, "live = t < T\n", "live = t <= T\n", T_GATED),
    ("group ignored", ROWS, "== g\n    return live", "== 0\n    return live", T_ADALN),
    ("bias not added", ROWS, "(y.to(tl.float32) + bias)", "(y.to(tl.float32) + 0.0 * bias)", T_GATED),
    (
        "rounded twice",
        ROWS,
        "gate * (y.to(tl.float32) + bias)",
        "(gate * (y.to(tl.float32) + bias)).to(tl.float16)",
        T_GATED,
    ),
    ("residual sign", ROWS, "x.to(tl.float32) + gate", "x.to(tl.float32) - gate", T_GATED),
    ("32-bit program ids", ROWS, "pid = tl.program_id(0).to(tl.int64)", "pid = tl.program_id(0)", T_GATED),
    (
        "group stride for the image",
        ROWS,
        "(mod.stride(0), mod.stride(1)) if",
        "(mod.stride(1), mod.stride(0)) if",
        T_ADALN,
    ),
    ("scale without the one", ADALN, "xhat * (1.0 + scale.to(tl.float32))", "xhat * scale.to(tl.float32)", T_ADALN),
    ("shift and scale swapped", ADALN, "    shift, scale = mod\n", "    scale, shift = mod\n", T_ADALN),
    (
        "scale of the wrong image",
        ADALN,
        "scale_ptr += b * scale_b + g * scale_g",
        "scale_ptr += p * scale_b + g * scale_g",
        T_ADALN,
    ),
    (
        "one token's shift for all",
        ADALN,
        "load(shift_ptr, shift_t + cols, mask)",
        "load(shift_ptr, cols, mask)",
        T_ADALN,
    ),
    ("dx without c1", ADALN, "(dxhat - xhat * c1 - c2) * rstd", "(dxhat - c2) * rstd", T_ADALN),
    ("dx without rstd", ADALN, "(dxhat - xhat * c1 - c2) * rstd", "(dxhat - xhat * c1 - c2)", T_ADALN),
    ("dscale without xhat", ADALN, "sums[1] + dy * xhat", "sums[1] + dy", T_ADALN),
    (
        "per-token dscale of dxhat",
        ADALN,
        "tl.store(dscale_ptr + at, dy * xhat",
        "tl.store(dscale_ptr + at, dxhat * xhat",
        T_ADALN,
    ),
    ("tail of dshift lost", ADALN, "tl.store(dscale_ptr + cols2, sums2[0], mask=cols2 < D)", "pass", T_ADALN),
    ("plain: gate of the wrong image", PLAIN, "gate_ptr += b * gate_b", "gate_ptr += (b // 2) * gate_b", T_GATED),
    ("plain: dy without the gate", PLAIN, "dx * gate, mask=live", "dx, mask=live", T_GATED),
    ("plain: dgate without the bias", PLAIN, "dgate + sum_dx * load_bias(bias_ptr, cols, cols < D)", "dgate", T_GATED),
    ("plain: dgate forgets rows", PLAIN, "dgate + dx * head[1].to(tl.float32)", "dx * head[1].to(tl.float32)", T_GATED),
    ("plain: bias gradient without the gate", PLAIN, "sum_dx2 * gate2", "sum_dx2", T_GATED),
    ("plain: the second row twice", PLAIN, "g, t + 1, T", "g, t, T", T_GATED),
    (
        "fused: h from x",
        FUSED,
        "tl.store(h_ptr + at, x * w + shift, mask=mask)",
        "tl.store(h_ptr + at, x * w, mask=mask)",
        T_GATED,
    ),
    ("fused: scale strides of shift", FUSED, "scale_ptr += b * scale_b", "scale_ptr += b * gate_b", T_GATED),
    ("fused: dx without the residual's gradient", FUSED, "dx += piece[2].to(tl.float32)", "dx += 0.0", T_GATED),
    ("fused: dy without the gate", FUSED, "tl.store(dy_ptr + at, dx * gate", "tl.store(dy_ptr + at, dx", T_GATED),
    ("fused: dgate from dh", FUSED, "sums[0] + dx * piece[1]", "sums[0] + dh * piece[1]", T_GATED),
    ("fused: dshift forgets rows", FUSED, "sums[1] + dh,", "dh,", T_GATED),
    ("fused: dscale of x, not xhat", FUSED, "sums[2] + dh * xhat", "sums[2] + dh * piece[0].to(tl.float32)", T_GATED),
    (
        "fused: dgate without the bias",
        FUSED,
        "sums[0] + sums[3] * load_bias(bias_ptr, cols, cols < D)",
        "sums[0]",
        T_GATED,
    ),
    (
        "fused: partial sums overlap",
        FUSED,
        "part_ptr + pid * K * D, sums, gate",
        "part_ptr + pid * D, sums, gate",
        T_GATED,
    ),
    ("modulation copied", "sra_fast/ops/_modulation.py", "modulation if modulation.stride(-1) == 1 else", "", T_GATED),
    (
        "x saved as well",
        "sra_fast/ops/gated_residual.py",
        "save_for_backward(x_new, y,",
        "save_for_backward(x_new, y + 0,",
        T_GATED,
    ),
    (
        "more bytes than stated",
        ADALN,
        "load(x_ptr, row * D + cols, mask), mod",
        "load(x_ptr, row * D + cols, mask) + 0 * load(x_ptr, row * D + cols, mask), mod",
        T_ROWS,
    ),
    (
        "attention: groups ignored",
        ATTENTION,
        "groups[:, :, None] == groups[:, None, :]",
        "groups[:, :, None] == groups[:, :, None]",
        T_ATTENTION,
    ),
    ("attention: slowest wins", ATTENTION, "best = min(times", "best = max(times", T_ATTENTION),
    ("attention: measured every time", ATTENTION, "if key in _chosen:", "if False:", T_ATTENTION),
    ("attention: measured with the global seed", ATTENTION, ", generator=generator)", ")", T_ATTENTION),
]


def noticed(name: str, path: str, old: str, new: str, test: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", "data", "runs"))
        source = (tree / path).read_text()
        assert old in source, f"{name}: {path} no longer contains {old!r}"
        (tree / path).write_text(source.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
        environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        # 1: a test failed; negative: a test read or wrote outside its tensors and died of it.  2 would be a file that
        # does not even import, which proves nothing
        red = run.returncode == 1 or run.returncode < 0
        first = next((s for s in run.stdout.splitlines() if s.startswith("FAILED")), f"exit {run.returncode}")
        print(f"{'red   ' if red else 'MISSED'}  {name}: {first.partition(' - ')[0]}", flush=True)
        return red


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    results = [noticed(*bug) for bug in BUGS if wanted in bug[0]]
    print(f"{sum(results)} of {len(results)} noticed")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
