"""Everything worth knowing of a fresh GPU machine, most valuable first:  python benchmarks/gpu_suite.py --out DIR

Parts: tests on CUDA, operators, training steps of 32 and of 256 images, the ladder, the probe of stacked products.  Each is a
process of its own with a limit in time, ended when that is reached; what it has written stays.  Time that a part leaves goes to
the next ones.
DIR gets rows.json (what the tables are made from), a log of every part, and summary.json, rewritten after every part.
"""
import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from record import environment  # noqa: E402

# share of the budget in seconds of 540
PARTS = {"tests": 115, "ops": 50, "steps": 185, "large": 110, "ladder": 60, "probe": 20}
# what tells something of a GPU; what compilers make of the kernels needs none
TESTS = ["tests/engine/test_cuda.py", "tests/engine/test_teacher_pass.py", "tests/ops", "tests/models"]
COMPILED = ["--ignore-glob", "*/test_codegen_*.py", "-k", "not compiles_without_spills"]
TAIL = 4000
PATIENCE = 5.0


def commands(out: Path, device: str, reference: str | None) -> dict[str, list[str]]:
    """The command of every part; on a CPU the same programs at the smallest sizes."""
    rows = ["--device", device, "--json", str(out / "rows.json")]
    published = ["--reference", reference] if reference else []
    tests = ["-m", "pytest", "-v", "-p", "no:cacheprovider"]
    step, ops = ["benchmarks/train_step.py", *rows, *published], ["benchmarks/run.py", *rows]
    if device == "cpu":
        small = ["--model", "SiT-S/8", "--resolution", "64", "--batch", "1", "--warmup", "0", "--steps", "1", "--profile", "0"]
        return {
            "tests": [*tests, "tests/test_import.py"],
            "ops": [*ops, "--ops", "noise_pair", "--budget", "0.002"],
            "steps": [*step, *small, "--variants", "plain"],
            "large": [*step, *small, "--variants", "plain+train.recompute=norm"],
            "ladder": [*step, *small, "--variants", "truncated"],
            "probe": ["benchmarks/stacked_products.py", *rows, *small[:6]],
        }
    quick = ["--model", "SiT-XL/2", "--warmup", "4", "--steps", "10"]
    rivals = ["strong", *(["reference"] if reference else [])]
    # of 256 images 80 GB do not hold every activation
    steps, large = ["plain", "sra", "sra_fp8", *rivals], ["plain+train.recompute=norm", "sra+train.recompute=norm", *rivals]
    return {
        "tests": [*tests, "--durations", "20", *side_by_side(), *COMPILED, *TESTS],
        "ops": [*ops, "--models", "SiT-XL/2", "--resolution", "256", "--batch", "32", "--variants", "ours,eager,compile"],
        "steps": [*step, *quick, "--batch", "32", "--variants", ",".join(steps)],
        "large": [*step, *quick, "--batch", "256", "--variants", ",".join(large)],
        "ladder": [*step, *quick, "--batch", "32", "--variants", "ladder"],
        "probe": ["benchmarks/stacked_products.py", *rows],
    }


def side_by_side() -> list[str]:
    """Options of pytest for many processes on one GPU, as far as its plugins are installed."""
    options = []
    if importlib.util.find_spec("xdist"):
        workers = max(2, min(12, 3 * (os.cpu_count() or 1) // 4))
        # one test at a time spreads the long ones, which come first.  "load" goes on after a test that has
        # ended its process; the modes that keep groups together would start it again
        options += ["-n", str(workers), "--dist", "load", "--maxschedchunk", "1", "--max-worker-restart", "200"]
    if importlib.util.find_spec("pytest_timeout"):
        # from a thread, which ends the process: what waits for the device does not see a signal.
        # Shortly before, pytest itself prints where every thread is
        options += ["--timeout", "60", "--timeout-method", "thread"]
        options += ["--override-ini", "faulthandler_timeout=55"]
    return options


def run_part(command: list[str], log: Path, seconds: float, device: str) -> dict:
    """Run a command for at most so long; its output goes to ``log`` as it comes."""
    # the width is pytest's: a cause is cut off at the end of its line
    environ = {"COLUMNS": "160", **os.environ, "PYTHONUNBUFFERED": "1"}
    environ |= {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    begin, late = time.perf_counter(), False
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(timeout=max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            late = True
        finally:
            end_group(process)
    return {
        "command": "python " + " ".join(command), "returncode": process.returncode, "ran_over": late,
        "seconds": round(time.perf_counter() - begin, 1), "tail": log.read_text(errors="replace")[-TAIL:],
    }  # fmt: skip


def end_group(process: subprocess.Popen) -> None:
    """End a process and whatever it has started.  First it is interrupted: pytest then says what has failed so far, and
    launchers end their workers; some shells make their children deaf to that."""
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + PATIENCE
        try:
            os.killpg(process.pid, signal_number)
            while time.monotonic() < deadline:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:  # nothing is left of it
            break
    process.wait()


def run_suite(todo: dict[str, list[str]], out: Path, budget: float, device: str) -> list[dict]:
    """All parts within ``budget`` seconds; every part may take its share of what is left."""
    where, found, begin = environment(device, "python benchmarks/gpu_suite.py " + " ".join(sys.argv[1:])), [], time.perf_counter()
    names = list(todo)
    for i, name in enumerate(names):
        left = budget - (time.perf_counter() - begin)
        seconds = left * PARTS[name] / sum(PARTS[later] for later in names[i:])
        print(f"{name}: at most {seconds:.0f} s", flush=True)
        found.append({"part": name, **run_part(todo[name], out / f"{name}.log", seconds, device)})
        (out / "summary.json").write_text(json.dumps({**where, "parts": found}, indent=1) + "\n")
        state = "ran over" if found[-1]["ran_over"] else f"exit code {found[-1]['returncode']}"
        print(f"{found[-1]['tail'].rstrip()[-1500:]}\n{name}: {state} after {found[-1]['seconds']} s", flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda text: text.split(",")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_suite", help="default: runs/gpu_suite")
    parser.add_argument("--only", type=words, default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--skip", type=words, default=[])
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything (default 540)")
    parser.add_argument("--reference", help="a checkout of the published code")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run at the smallest sizes")
    args = parser.parse_args(argv)
    unknown = [name for name in (*args.only, *args.skip) if name not in PARTS]
    chosen = [name for name in PARTS if name in args.only and name not in args.skip]
    if unknown or not chosen:
        parser.error(f"expected parts of {', '.join(PARTS)} and at least one left, got {', '.join(unknown) or 'none'}")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: --device cpu is a dry run", file=sys.stderr)
        return 2
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    reference = str(Path(args.reference).resolve()) if args.reference else None
    everything = commands(out, args.device, reference)
    found = run_suite({name: everything[name] for name in chosen}, out, args.budget, args.device)
    return 1 if any(part["returncode"] for part in found) else 0


if __name__ == "__main__":
    sys.exit(main())
