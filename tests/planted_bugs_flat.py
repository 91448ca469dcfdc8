"""Plant one bug at a time in a copy of the tree and see the tests of that op go red.

    python tests/planted_bugs_flat.py [substring of the path ...]

Prints one line per bug; exit status 1 if one survives or a baseline is not green.  Not collected by pytest: about ten
minutes, the CUDA file (rebuilt per bug) half of them.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ("kernels", "sra_fast", "csrc", "tests", "setup.py", "pyproject.toml", "README.md")

ALIGN, NOISE, EMA, ADAMW, CUDA = (
    "kernels/align_distance.py",
    "kernels/noise_pair.py",
    "kernels/ema_update.py",
    "kernels/adamw_ema.py",
    "csrc/ema_update.cu",
)
TESTS = {
    ALIGN: "tests/ops/test_align_distance.py",
    NOISE: "tests/ops/test_noise_pair.py",
    EMA: "tests/ops/test_ema_update.py",
    ADAMW: "tests/ops/test_adamw_ema.py",
    CUDA: "tests/test_csrc.py",
}

# (file, what it does, original text, planted text); the original must occur exactly once
BUGS = [
    # token kernel
    (ALIGN, "every row reads image 0", "b, t = row // T, row % T", "b, t = row * 0, row % T"),
    (ALIGN, "mean over the padded width", "dist = tl.sum(loss, axis=1) / D", "dist = tl.sum(loss, axis=1) / BLOCK_D"),
    (ALIGN, "smooth-L1 without its offset", "size - 0.5 * beta", "size"),
    (
        ALIGN,
        "smooth-L1 gradient without 1/beta",
        "grad = tl.where(quadratic, diff / beta,",
        "grad = tl.where(quadratic, diff,",
    ),
    (ALIGN, "l2 gradient without its 2", "grad = 2.0 * diff", "grad = diff"),
    (
        ALIGN,
        "32-bit rows",
        "row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)\n    b, t",
        "row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)\n    b, t",
    ),
    # cosine, both kernels
    (ALIGN, "cosine gradient without its radial term", "tl.expand_dims(along, axis) * p -", "0.0 * p -"),
    (ALIGN, "0/0 at a zero vector", "tl.where(p_norm > 0.0, p_norm, 1.0)", "p_norm"),
    (ALIGN, "no clamp of the norm", "p_clamped = tl.maximum(p_norm, 1e-8)", "p_clamped = p_norm"),
    # channel kernel
    (
        ALIGN,
        "padded tokens enter the sums",
        "mask = (t < T) & (cols < D)[None, :]\n\n    p_tile",
        "mask = (t >= 0) & (cols < D)[None, :]\n\n    p_tile",
    ),
    (ALIGN, "distances of image 0 overwritten", "tl.store(dist_ptr + b * D + cols,", "tl.store(dist_ptr + cols,"),
    (ALIGN, "gradient scaled by the wrong length", "_cosine(p, q, 0, T * 1.0)", "_cosine(p, q, 0, D * 1.0)"),
    (
        ALIGN,
        "wrong token stride of the target",
        "t * target_stride_t + cols[None, :]",
        "t * pred_stride_t + cols[None, :]",
    ),
    (ALIGN, "32-bit images", "b = tl.program_id(0).to(tl.int64) // num_blocks", "b = tl.program_id(0) // num_blocks"),
    # backward kernel
    (
        ALIGN,
        "upstream gradient of image 0 for all",
        "ddist_ptr + b * ddist_stride_b + t * ddist_stride_n",
        "ddist_ptr + t * ddist_stride_n",
    ),
    (ALIGN, "wrong tile", "pid // num_d % num_t * BLOCK_T", "pid % num_t * BLOCK_T"),
    (ALIGN, "stride of the upstream gradient ignored", "cols * ddist_stride_n", "cols"),
    (ALIGN, "channel gradient divided by D", "mask=cols < D, other=0.0) / T", "mask=cols < D, other=0.0) / D"),
    # noise pair
    (NOISE, "teacher at the student's time", "_interpolant(t_teacher, COSINE)", "_interpolant(t, COSINE)"),
    (NOISE, "velocity with the wrong sign", "dalpha * x + dsigma * noise", "dalpha * x - dsigma * noise"),
    (NOISE, "mean taken for std", "x0_stride + N + cols", "x0_stride + cols"),
    (NOISE, "latent scale dropped", "x *= scale", "x *= 1.0"),
    (NOISE, "sine coefficient off by 1e-4", "8.3333333333333333e-03", "8.4333333333333333e-03"),
    (NOISE, "output of another image", "out = b * N + cols", "out = b * BLOCK + cols"),
    (
        NOISE,
        "noise stride ignored",
        "noise_ptr + b * noise_stride + cols, mask=mask, other=0.0).to(tl.float32)\n\n",
        "noise_ptr + b * N + cols, mask=mask, other=0.0).to(tl.float32)\n\n",
    ),
    (NOISE, "32-bit image index", "b = tl.program_id(0).to(tl.int64) //", "b = tl.program_id(0) //"),
    # EMA in Triton
    (EMA, "weight and decay swapped", "ema + weight * (p - ema)", "ema + decay * (p - ema)"),
    (EMA, "far end of the lerp wrong", "p - decay * (p - ema)", "p - weight * (p - ema)"),
    (EMA, "mask ignores the count", "mask = cols < count", "mask = cols < CHUNK"),
    (EMA, "copy of the parameter", "tl.store(copy_ptr + cols, new,", "tl.store(copy_ptr + cols, p,"),
    (EMA, "element size of fp32 for all", "first * t.element_size()", "first * 4"),
    (EMA, "odd counts in the wide launch", "split = numel // 16 * 16 if", "split = numel if"),
    (EMA, "plan found by address alone", "(t.data_ptr(), t.numel(), t.dtype) for", "(t.data_ptr(),) for"),
    # AdamW with EMA
    (ADAMW, "no weight decay", "shrink * param - step_size", "param - step_size"),
    (ADAMW, "no second bias correction", "tl.sqrt(exp_avg_sq) * inv_sqrt_bias2 + eps", "tl.sqrt(exp_avg_sq) + eps"),
    (ADAMW, "no first bias correction", "lr / (1 - beta1**step)", "lr"),
    (ADAMW, "second moment of |g|", "weight2 * grad * grad", "weight2 * tl.abs(grad)"),
    (ADAMW, "clip scale ignored", "grad *= tl.load(clip_scale_ptr).to(tl.float32)", "grad *= 1.0"),
    (
        ADAMW,
        "EMA of a shrunk parameter",
        "ema + ema_weight * (param - ema)",
        "ema + ema_weight * (shrink * param - ema)",
    ),
    (ADAMW, "weights are the moment", "tl.store(weights_ptr + cols, param,", "tl.store(weights_ptr + cols, exp_avg,"),
    (ADAMW, "the last elements are forgotten", "((0, even), (even, N))", "((0, even),)"),
    # CUDA: reference, device code (run on host memory), tables
    (CUDA, "bisection off by one", "first_chunk[middle] <= chunk", "first_chunk[middle] < chunk"),
    (
        CUDA,
        "second vector repeats the first",
        "const int at = (u * kThreads + thread) * kVector;\n    load",
        "const int at = thread * kVector;\n    load",
    ),
    (CUDA, "last element of a tail", "i < kChunk && i < left", "i < kChunk && i + 1 < left"),
    (CUDA, "chunk count survives the table", "table.num_tensors = 0;\n      num_chunks = 0;", "table.num_tensors = 0;"),
    (
        CUDA,
        "reference copies the parameter",
        "from_float(ema[i], copy + i);\n  }",
        "from_float(to_float(p[i]), copy + i);\n  }",
    ),
    (CUDA, "alignment of the EMA not asked for", "is_aligned(ema) && is_aligned(p) &&", "is_aligned(p) &&"),
]


def run_tests(tests: str, bug: tuple | None) -> int:
    """Exit status of the op's tests in a fresh copy of the tree, with the bug planted."""
    with tempfile.TemporaryDirectory() as folder:
        for name in TREE:
            source, target = ROOT / name, Path(folder) / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
            else:
                shutil.copy(source, target)
        if bug:
            path, _, old, new = bug
            text = (ROOT / path).read_text()
            if text.count(old) != 1:
                raise SystemExit(f"{path}: expected {old!r} once, found it {text.count(old)} times")
            (Path(folder) / path).write_text(text.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:warnings", tests]
        env = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(command, cwd=folder, env=env, capture_output=True).returncode


def main(wanted: list[str]) -> int:
    bugs = [bug for bug in BUGS if not wanted or any(part in bug[0] for part in wanted)]
    survivors = 0
    for path in dict.fromkeys(bug[0] for bug in bugs):
        status = run_tests(TESTS[path], None)
        survivors += status != 0
        print(f"{'green' if status == 0 else 'RED'}  {path}: as it is", flush=True)
        for bug in (bug for bug in bugs if bug[0] == path):
            status = run_tests(TESTS[path], bug)
            # 1: a test failed; negative: a wild address killed the interpreter; anything else shows nothing
            caught = status == 1 or status < 0
            survivors += not caught
            print(f"{'caught' if caught else f'SURVIVED ({status})'}  {path}: {bug[1]}", flush=True)
    print(f"{len(bugs)} bugs, {survivors} survived")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
