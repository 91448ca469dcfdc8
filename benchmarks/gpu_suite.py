"""Everything worth knowing of a fresh GPU machine, in two commands of about five minutes:

    python benchmarks/gpu_suite.py first  --out DIR
    python benchmarks/gpu_suite.py second --out DIR --reference PATH --caches FILE

first: every operator right or wrong and its share of the copy bandwidth, attention's backends, training steps of 32
images with the teacher run in every way, the CUDA tests, and what fills the compilers' caches.
second: steps against the rivals at 32 and 256 images and with the engine's options, the tests that were red, and the
operators against torch.compile.

Each ends with a VERDICT.  Parts are processes of their own with a limit in time; what they have written stays, and time
that a part leaves goes to the next.  DIR gets rows.json (what the tables are made from), a log of every part, summary.json
and verdict.txt, renewed after every part; from first also caches.tgz.  --archive FOLDER renews an archive of all that every
ten seconds, for a machine that may be taken away.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from record import environment  # noqa: E402
from verdict import failed_tests, predicted_rows, render  # noqa: E402

BUDGETS = {"first": 270, "second": 310}
# what tells something of a GPU; what compilers make of the kernels needs none
TESTS = [
    "tests/training/test_cuda.py",
    "tests/training/test_graphed_step.py",
    "tests/alignment/test_ema_teacher.py",
    "tests/ops",
    "tests/models",
]
COMPILED = ["--ignore-glob", "*/test_codegen_*.py", "-k", "not compiles_without_spills"]
MODEL, PIXELS, SMALL_MODEL = "SiT-XL/2", "256", "SiT-B/2"
TAIL = 4000
PATIENCE = 5.0
ARCHIVE_PERIOD = 10.0


@dataclass(frozen=True)
class Part:
    """One program of the suite.

    Attributes:
        name: of its log.
        share: of the budget, in seconds of the whole.
        command: what Python runs, or a shell's line.
        beside: a program that runs at the same time, its result not waited for beyond the part's own limit.
        environment: variables of its own.
    """

    name: str
    share: float
    command: list[str] | str
    beside: "Part | None" = None
    environment: dict[str, str] = field(default_factory=dict)


def side_by_side() -> list[str]:
    """Options of pytest for many processes on one GPU, as far as its plugins are installed."""
    options = []
    if importlib.util.find_spec("xdist"):
        workers = max(2, min(12, 3 * (os.cpu_count() or 1) // 4))
        # one test at a time spreads the long ones, which come first.  "load" goes on after a test that has
        # ended its process; the modes that keep groups together would start it again
        options += [
            "-n",
            str(workers),
            "--dist",
            "load",
            "--maxschedchunk",
            "1",
            "--max-worker-restart",
            "200",
        ]
    if importlib.util.find_spec("pytest_timeout"):
        # from a thread, which ends the process: what waits for the device does not see a signal.
        # Shortly before, pytest itself prints where every thread is
        options += ["--timeout", "60", "--timeout-method", "thread"]
        options += ["--override-ini", "faulthandler_timeout=55"]
    return options


def pytest_command(*chosen: str) -> list[str]:
    common = ["-m", "pytest", "-v", "--tb=short", "--durations", "20", "-p", "no:cacheprovider"]
    return [*common, *side_by_side(), *COMPILED, *chosen]


def build_probe(source: str, out: Path) -> str:
    """A shell's line that builds a probe of cuBLASLt, whose header and library come with torch's CUDA packages."""
    home = f'$({sys.executable} -c "import nvidia.cu13 as m; print(list(m.__path__)[0])")'
    return (
        f"export PATH=$PATH:/usr/local/cuda/bin; C={home} && "
        f"nvcc -O2 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -I$C/include {source} "
        f"-L$C/lib -l:libcublasLt.so.13 -Xlinker -rpath=$C/lib -o {out / 'probe'}"
    )


def case(batch: int, variants: str, model: str = MODEL) -> list[str]:
    return ["--case", model, PIXELS, str(batch), variants]


def first_parts(out: Path, probe: str | None) -> list[Part]:
    """Is it right, and what does a step cost?"""
    rows = ["--json", str(out / "rows.json")]
    ways = "plain,sra,sra_fp8,sra+align.teacher_stream=true,sra+train.residual=fp32,sra+train.graph=false,plain,sra"
    step = ["benchmarks/train_step.py", *rows, "--warmup", "5", "--steps", "30"]
    fill = Part("fill", 0, ["benchmarks/train_step.py", "--json", str(out / "fill.json"), "--untimed", *case(32, "strong")],
                environment={"TORCHINDUCTOR_COMPILE_THREADS": "4"})  # fmt: skip
    build = Part("build", 0, build_probe(probe, out)) if probe else None
    found = [
        Part("ops", 45, ["benchmarks/run.py", *rows, "--models", MODEL, "--resolution", PIXELS, "--batch", "32", "--variants",
                         "ours,eager", "--passes", "forward,backward", "--budget", "0.05"], beside=build),
        Part("attention", 12, ["benchmarks/attention_backends.py", *rows]),
        Part("steps", 105, [*step, *case(32, ways)]),
        Part("tests", 95, pytest_command(*TESTS), beside=fill, environment={"TRITON_CACHE_DIR": str(out / "test_caches")}),
    ]  # fmt: skip
    if probe:
        found.insert(2, Part("probe", 6, f"{out / 'probe'} 32 256"))
    return found


def second_parts(out: Path, reference: str | None, red: list[str]) -> list[Part]:
    """How does it compare, and what should the defaults be?"""
    rows = ["--json", str(out / "rows.json")]
    published = ["--reference", reference] if reference else []
    norm, strong = "+train.recompute=norm", "strong+graph=true"
    cases = [
        case(32, f"plain,sra,{strong},plain,sra,sra_fp8" + (",reference" if reference else "")),
        case(256, f"plain{norm},sra{norm}"),
        case(256, "plain,sra", SMALL_MODEL),
        case(
            32,
            f"sra{norm},sra+align.teacher_stream=true,swap_ema+graph=true,sra+train.compile=true",
        ),
        case(256, f"sra_fp8{norm},{strong}"),
        case(32, "sra+train.residual=fp32,strong"),
    ]
    limits = ["--warmup", "5", "--steps", "30", "--seconds", "4", "--time-limit", "60", "--shrink"]
    step = ["benchmarks/train_step.py", *rows, *published, *limits]
    found = [
        Part("steps", 205, [*step, *(word for words in cases for word in words)]),
        Part("ops", 40, ["benchmarks/run.py", *rows, "--models", MODEL, "--resolution", PIXELS, "--batch", "32", "--variants",
                         "ours,compile", "--passes", "forward,backward", "--budget", "0.05"]),
    ]  # fmt: skip
    if red:
        caches = {"TRITON_CACHE_DIR": str(out / "test_caches")}
        found.insert(1, Part("tests", 60, pytest_command(*red), environment=caches))
    return found


def dry_parts(which: str, out: Path) -> list[Part]:
    """The same programs at the smallest sizes, on a CPU."""
    rows = ["--device", "cpu", "--json", str(out / "rows.json")]
    step = [
        "benchmarks/train_step.py",
        *rows,
        "--warmup",
        "1",
        "--steps",
        "1",
        "--profile",
        "0",
        "--shrink",
    ]
    small = lambda variants: ["--case", "SiT-S/8", "64", "1", variants]
    ops = [
        "benchmarks/run.py",
        *rows,
        "--ops",
        "gated_residual_adaln,noise_pair",
        "--budget",
        "0.002",
    ]
    tests = Part("tests", 60, pytest_command("tests/test_import.py"))
    if which == "first":
        fill = Part("fill", 0, ["benchmarks/train_step.py", "--device", "cpu", "--json", str(out / "fill.json"), "--untimed",
                                "--warmup", "1", *small("plain")])  # fmt: skip
        beside = Part(tests.name, tests.share, tests.command, beside=fill)
        return [
            Part("ops", 45, [*ops, "--variants", "ours,eager"]),
            Part("steps", 90, [*step, *small("plain,sra,plain,sra")]),
            beside,
        ]
    return [
        Part("steps", 230, [*step, *small("plain,sra,swap_ema")]),
        Part("ops", 50, [*ops, "--variants", "ours,compile"]),
    ]


def start(part: Part, log: Path, out: Path, device: str) -> subprocess.Popen:
    """The part's process, in a group of its own; its output goes to ``log`` as it comes."""
    environ = {
        # the width is pytest's: a cause is cut off at the end of its line
        "COLUMNS": "160", **os.environ, "PYTHONUNBUFFERED": "1", "TRITON_CACHE_DIR": str(out / "caches" / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(out / "caches" / "inductor"), **part.environment,
    }  # fmt: skip
    if device == "cpu":
        environ["CUDA_VISIBLE_DEVICES"] = ""
    command = (
        ["bash", "-c", part.command]
        if isinstance(part.command, str)
        else [sys.executable, *part.command]
    )
    with open(log, "w") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environ,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run_part(part: Part, out: Path, seconds: float, device: str) -> list[dict]:
    """Run a part, and what goes beside it, for at most so long: one record of each."""
    begin, end = time.perf_counter(), time.perf_counter() + max(seconds, 0.1)
    running = [
        (each, start(each, out / f"{each.name}.log", out, device))
        for each in (part, part.beside)
        if each
    ]
    found = []
    try:
        for each, process in running:
            late = False
            try:
                process.wait(timeout=max(end - time.perf_counter(), 0.1))
            except subprocess.TimeoutExpired:
                late = True
                end_group(process)
            command = (
                each.command
                if isinstance(each.command, str)
                else "python " + " ".join(each.command)
            )
            found.append({
                "part": each.name, "command": command, "returncode": process.returncode, "ran_over": late,
                "seconds": round(time.perf_counter() - begin, 1),
                "tail": (out / f"{each.name}.log").read_text(errors="replace")[-TAIL:],
            })  # fmt: skip
    finally:
        for _, process in running:
            end_group(process)
    return found


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


def run_suite(which: str, parts: list[Part], out: Path, budget: float, device: str) -> list[dict]:
    """All parts within ``budget`` seconds; every part may take its share of what is left.  A verdict after each."""
    where = environment(device, "python benchmarks/gpu_suite.py " + " ".join(sys.argv[1:]))
    found, begin = [], time.perf_counter()
    for i, part in enumerate(parts):
        left = budget - (time.perf_counter() - begin)
        seconds = left * part.share / sum(later.share for later in parts[i:])
        print(f"{part.name}: at most {seconds:.0f} s", flush=True)
        for record in run_part(part, out, seconds, device):
            found.append(record)
            state = "ran over" if record["ran_over"] else f"exit code {record['returncode']}"
            print(
                f"{record['tail'].rstrip()[-1500:]}\n{record['part']}: {state} after {record['seconds']} s",
                flush=True,
            )
        (out / "summary.json").write_text(
            json.dumps({**where, "suite": which, "parts": found}, indent=1) + "\n"
        )
        (out / "verdict.txt").write_text(render(out, which))
    return found


def pack(out: Path, target: Path, names: list[str]) -> None:
    """An archive of these files and folders of ``out``; it is whole at any time."""
    partial = target.with_name(target.name + ".partial")
    # fast: the machine waits for it
    with tarfile.open(partial, "w:gz", compresslevel=1) as archive:
        for name in names:
            if (out / name).exists():
                archive.add(out / name, name)
    os.replace(partial, target)


def pack_results(out: Path, folder: Path) -> None:
    kept = [
        path.name
        for path in out.iterdir()
        if path.is_file() and path.suffix in (".json", ".log", ".txt", ".csv")
    ]
    pack(out, folder / "found.tgz", kept)


@contextlib.contextmanager
def archived(out: Path, folder: Path | None) -> Iterator[None]:
    """Meanwhile ``found.tgz`` in the folder holds what has been written so far; at the end ``caches.tgz`` too."""
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    done = threading.Event()

    def renew() -> None:
        while not done.wait(ARCHIVE_PERIOD):
            with contextlib.suppress(
                OSError
            ):  # a file that a part is replacing; the next round has it
                pack_results(out, folder)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        pack_results(out, folder)
        if (out / "caches.tgz").exists():
            os.replace(out / "caches.tgz", folder / "caches.tgz")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", choices=tuple(BUDGETS), help="the first command, or the second")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "gpu_suite", help="default: runs/gpu_suite"
    )
    parser.add_argument("--budget", type=float, help="seconds for everything (default 270 and 310)")
    parser.add_argument("--reference", help="second: a checkout of the published code")
    parser.add_argument(
        "--probe", help="first: a CUDA program to build and run with the arguments 32 256"
    )
    parser.add_argument(
        "--caches",
        type=Path,
        help="second: the caches.tgz that first has written, for the same --out",
    )
    parser.add_argument(
        "--archive",
        type=Path,
        help="a folder that gets found.tgz, renewed every ten seconds, and caches.tgz",
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: a dry run at the smallest sizes",
    )
    args = parser.parse_args(argv)
    for name in ("reference", "probe", "caches"):
        given = getattr(args, name)
        if given is not None and not Path(given).exists():
            parser.error(f"--{name}: there is no {given}")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: --device cpu is a dry run", file=sys.stderr)
        return 2
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    red = []
    if args.caches:
        with tarfile.open(args.caches) as archive:
            archive.extractall(out, filter="data")
        red = (out / "red.txt").read_text().split("\n") if (out / "red.txt").exists() else []
    absolute = lambda path: str(Path(path).resolve()) if path else None
    if args.device == "cpu":
        parts = dry_parts(args.which, out)
    elif args.which == "first":
        parts = first_parts(out, absolute(args.probe))
    else:
        parts = second_parts(out, absolute(args.reference), [name for name in red if name])
    # what the verdict compares with takes a few seconds of a core, which a part can hide
    threading.Thread(target=predicted_rows, daemon=True).start()
    with archived(out, args.archive.resolve() if args.archive else None):
        found = run_suite(args.which, parts, out, args.budget or BUDGETS[args.which], args.device)
        if args.which == "first":  # for the second
            (out / "red.txt").write_text("\n".join(failed_tests(out / "tests.log")))
            pack(out, out / "caches.tgz", ["caches", "red.txt"])
    print((out / "verdict.txt").read_text())
    return 1 if any(part["returncode"] for part in found) else 0


if __name__ == "__main__":
    sys.exit(main())
