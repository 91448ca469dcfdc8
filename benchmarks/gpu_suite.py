"""Measure everything worth knowing on a fresh GPU machine, in commands of about five minutes:

    python -m benchmarks.gpu_suite first  --out DIR
    python -m benchmarks.gpu_suite second --out DIR --published PATH --caches FILE
    python -m benchmarks.gpu_suite models --out DIR --checkout PATH
    python -m benchmarks.gpu_suite alignments --out DIR

first: every operator right or wrong and its percentage of the copy bandwidth, attention's backends,
training steps of 32 images with the teacher run in every way, the CUDA tests, and a run that fills the
compilers' caches.
second: steps against the rivals at 32 and 256 images and with the engine's options, the tests that were
red, and the operators against torch.compile.
models: the operators without a row of a GPU against torch.compile, and other people's models with
one line of ours, the kernels in them tested beforehand.
alignments: the tests of every alignment target, then its step for two models at 32 and 256 images.

All end with a VERDICT. Every part is a process with a time limit. What it has written stays, and time
that it leaves goes to the parts after it. DIR gets rows.json (the source of the tables), a log of every part, and
after every part a new summary.json and verdict.txt; from first also caches.tgz. --archive FOLDER packs
all of that every ten seconds, for a machine that may be taken away.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks.operators.registry import OPERATORS
from benchmarks.other_models.checkouts import recognise
from benchmarks.record import ROOT, VARIABLES, command_line, environment, load_results
from benchmarks.report.verdict import failed_tests, predicted_rows, render
from benchmarks.step.variants import OTHER_TARGETS, PUBLISHED

# seconds
BUDGETS = {"first": 270, "second": 310, "models": 400, "alignments": 400}
# programs that the parts run
STEPS = ["-m", "benchmarks.step.train_step"]
OPERATOR_RUN = ["-m", "benchmarks.operators.run"]
ATTENTION = ["-m", "benchmarks.operators.attention_backends"]
OTHER_MODELS = ["-m", "benchmarks.integrations"]

# tests that depend on the GPU; what compilers generate from the kernels does not
TESTS = [
    "tests/training/test_cuda.py",
    "tests/training/test_graphed_step.py",
    "tests/alignment/test_ema_teacher.py",
    "tests/ops",
    "tests/models",
]
WITHOUT_CODEGEN = ["--ignore-glob", "*/test_codegen_*.py", "-k", "not compiles_without_spills"]

# tests of other people's models that launch kernels, and those of the operators that they need
MODEL_TESTS = [
    "tests/ops/test_optional_vectors.py",
    "tests/ops/test_two_modulations.py",
    "tests/ops/test_tables.py",
    "tests/ops/test_qk_norm_rope.py",
    "tests/ops/test_swiglu.py",
    "tests/ops/test_attention.py",
    "tests/ops/test_attention_segments.py",
    "tests/integrations/test_own_models.py::test_kernels",
    "tests/integrations/test_backend.py::test_the_kernels_run",
    "tests/integrations/test_patches.py::test_the_same_results",
]
# tests of alignment targets that launch kernels
ALIGNMENT_TESTS = [
    "tests/alignment/test_ema_teacher.py",
    "tests/alignment/test_groups.py::test_gradients_with_kernels_and_without",
    "tests/ops/test_attention_segments.py",
]
# diffusers' models and a checkout's, by their options, meant to be so large that the device and not
# its host is the limit. Two blocks of each kind, because a compiler needs time for every block.
DIFFUSERS_MODELS = {
    "sd3": ["--model", "SD3Transformer2DModel", "--batch", "8", "--layers", "2"],
    "flux": ["--model", "FluxTransformer2DModel", "--batch", "4", "--layers", "2"],
    "wan": ["--model", "WanTransformer3DModel", "--batch", "2", "--layers", "2"],
    "wan_tokens": [
        *("--model", "WanTransformer3DModel, a time per token", "--batch", "2", "--layers", "2"),
        "--per-token",
    ],
    "lumina": ["--model", "Lumina2Transformer2DModel", "--batch", "4", "--layers", "2"],
}
CHECKOUT_MODELS = {
    "DiT": ["--model", "DiT-XL/2"],
    "SiT": ["--model", "SiT-XL/2"],
    "LightningDiT": ["--model", "LightningDiT-XL/1"],
}
CHECKOUT_SIZE = ["--batch", "32", "--layers", "4"]

MODEL = "SiT-XL/2"
PIXELS = "256"
SMALL_MODEL = "SiT-B/2"
# characters of a log in summary.json, and on the screen
TAIL = 4000
SHOWN_TAIL = 1500
# seconds between signals to a part that ran over, and between archives
PATIENCE = 5.0
ARCHIVE_PERIOD = 10.0


@dataclass(frozen=True)
class Part:
    """One program of the suite.

    Attributes:
        name: of the part and of its log.
        share: of the budget, in seconds.
        command: arguments of Python, or a line for the shell.
        beside: a program that runs at the same time, under the same time limit.
        environment: variables to set.
    """

    name: str
    share: float
    command: list[str] | str
    beside: "Part | None" = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def arguments(self) -> list[str]:
        """What starts the program."""
        if isinstance(self.command, str):
            return ["bash", "-c", self.command]
        return [sys.executable, *self.command]

    @property
    def shown(self) -> str:
        """The command, as one would type it."""
        return self.command if isinstance(self.command, str) else "python " + " ".join(self.command)


def parallel_options() -> list[str]:
    """Options of pytest for many processes on one GPU, as far as its plugins are installed."""
    options = []
    if importlib.util.find_spec("xdist"):
        workers = max(2, min(12, 3 * (os.cpu_count() or 1) // 4))
        options += ["-n", str(workers)]
        # "load" continues after a test that has killed its worker; the modes that keep files together would
        # start that test again. One test at a time spreads the long ones, which come first.
        options += ["--dist", "load", "--maxschedchunk", "1", "--max-worker-restart", "200"]
    if importlib.util.find_spec("pytest_timeout"):
        # the thread method ends the process: a test that waits for the device does not see a signal
        options += ["--timeout", "60", "--timeout-method", "thread"]
        # just before that, pytest prints where every thread is
        options += ["--override-ini", "faulthandler_timeout=55"]
    return options


def pytest_command(*chosen: str) -> list[str]:
    """Run the chosen files or tests, but none of generated code."""
    common = ["-m", "pytest", "-v", "--tb=short", "--durations", "20", "-p", "no:cacheprovider"]
    return [*common, *parallel_options(), *WITHOUT_CODEGEN, *chosen]


def build_probe(source: str, out: Path) -> str:
    """A shell line that builds a probe of cuBLASLt; header and library come with torch's CUDA packages."""
    home = f'$({sys.executable} -c "import nvidia.cu13 as m; print(list(m.__path__)[0])")'
    return (
        f"export PATH=$PATH:/usr/local/cuda/bin; C={home} && "
        f"nvcc -O2 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -I$C/include {source} "
        f"-L$C/lib -l:libcublasLt.so.13 -Xlinker -rpath=$C/lib -o {out / 'probe'}"
    )


def case(batch: int, variants: str, model: str = MODEL) -> list[str]:
    """Options of ``train_step`` for one case."""
    return ["--case", model, PIXELS, str(batch), variants]


def operators_command(out: Path, variants: str, names: list[str] | None = None) -> list[str]:
    """Measure operators at the headline's shape: those of the names; all without names."""
    return [
        *OPERATOR_RUN,
        *("--json", str(out / "rows.json")),
        *(["--ops", ",".join(names)] if names else []),
        *("--models", MODEL, "--resolution", PIXELS, "--batch", "32"),
        *("--variants", variants, "--passes", "forward,backward", "--budget", "0.05"),
    ]


def first_parts(out: Path, probe: str | None) -> list[Part]:
    """Parts that answer: is it right, and what does a step cost?

    Args:
        out: folder of the run.
        probe: source of a CUDA program to build and run, or None.
    """
    rows = ["--json", str(out / "rows.json")]
    # the teacher in every way; plain and sra twice, for their spread
    variants = (
        "plain,sra,sra_fp8,sra+align.teacher_stream=false,sra+train.recompute=norm,"
        "sra+SRA_FAST_CUBLASLT=0,plain,sra"
    )
    # compiles the best rival for second while the tests run
    fill = Part(
        "fill",
        0,
        [*STEPS, "--json", str(out / "fill.json"), "--untimed", *case(32, "strong")],
        environment={"TORCHINDUCTOR_COMPILE_THREADS": "4"},
    )
    build = Part("build", 0, build_probe(probe, out)) if probe else None
    # a variant that hangs costs its own time, and not that of those after it
    timing = ["--warmup", "5", "--steps", "30", "--time-limit", "40"]
    found = [
        # building takes no device, so it runs beside the operators
        Part("ops", 45, operators_command(out, "ours,eager"), beside=build),
        Part("attention", 12, [*ATTENTION, *rows]),
        Part("steps", 105, [*STEPS, *rows, *timing, *case(32, variants)]),
        Part(
            "tests",
            95,
            pytest_command(*TESTS),
            beside=fill,
            environment={"TRITON_CACHE_DIR": str(out / "test_caches")},
        ),
    ]
    if probe:
        found.insert(2, Part("probe", 6, f"{out / 'probe'} 32 256"))
    return found


def device_memory() -> int:
    """Bytes of the GPU; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    return torch.cuda.get_device_properties(0).total_memory


def second_parts(out: Path, published: str | None, red: list[str]) -> list[Part]:
    """Parts that answer: how does it compare, and what should the defaults be?

    Args:
        out: folder of the run.
        published: a checkout of the published code, or None.
        red: tests that failed in first.
    """
    norm = "+train.recompute=norm"
    strong = "strong+graph=true"
    # 256 images do not fit 80 GB
    largest = 256 if device_memory() > 100e9 else 128
    published_too = f",{PUBLISHED}" if published else ""
    # most valuable first
    cases = [
        case(32, f"plain,sra,{strong},plain,sra,sra_fp8{published_too}"),
        case(256, f"plain{norm},sra{norm},sra_fp8{norm}"),
        case(256, "plain,sra", SMALL_MODEL),
        case(32, f"swap_ema+graph=true,sra+train.compile=true,sra{norm}"),
        case(largest, strong),
        case(32, "sra+align.teacher_stream=false,sra+train.residual=fp32,strong"),
    ]
    steps = [*STEPS, "--json", str(out / "rows.json")]
    if published:
        steps += ["--published", published]
    steps += ["--warmup", "5", "--steps", "30", "--seconds", "4", "--time-limit", "60", "--shrink"]
    found = [
        Part("steps", 205, [*steps, *(word for words in cases for word in words)]),
        Part("ops", 40, operators_command(out, "ours,compile")),
    ]
    if red:
        caches = {"TRITON_CACHE_DIR": str(out / "test_caches")}
        found.insert(1, Part("tests", 60, pytest_command(*red), environment=caches))
    return found


def alignments_parts(out: Path) -> list[Part]:
    """Parts that answer: what does a step with each alignment target cost?"""
    names = ["plain", "sra", *OTHER_TARGETS]
    norm = [f"{name}+train.recompute=norm" for name in names]
    # most valuable first; plain twice, for its spread
    cases = [
        case(32, ",".join([*names, "plain"])),
        case(256, ",".join(norm)),
        case(256, ",".join(names), SMALL_MODEL),
        case(32, ",".join(names), SMALL_MODEL),
    ]
    steps = [*STEPS, "--json", str(out / "rows.json"), "--profile", "1"]
    steps += ["--warmup", "5", "--steps", "30", "--seconds", "4", "--time-limit", "60", "--shrink"]
    caches = {"TRITON_CACHE_DIR": str(out / "test_caches")}
    return [
        Part("tests", 50, pytest_command(*ALIGNMENT_TESTS), environment=caches),
        Part("steps", 350, [*steps, *(word for words in cases for word in words)]),
    ]


def side_by_side(commands: list[list[str]]) -> str:
    """A shell line that runs Python several times at once, and fails if one of the runs does."""
    starts = [f'{shlex.join([sys.executable, *command])} & jobs="$jobs $!"' for command in commands]
    end = "for job in $jobs; do wait $job || failed=1; done; exit ${failed:-0}"
    return "\n".join([*starts, end])


def unmeasured_operators() -> list[str]:
    """Operators that no row of a GPU has timed."""
    rows = load_results()
    timed = {
        row["name"].partition(".")[0]
        for row in rows
        if row["kind"] == "op"
        and row["variant"] == "ours"
        and row["device"] != "cpu"
        and "ms" in row
    }
    return [name for name in OPERATORS if name not in timed]


def models_parts(out: Path, checkouts: list[Path]) -> list[Part]:
    """Parts that answer: do other people's models become faster, and by which operators?

    Args:
        out: folder of the run.
        checkouts: of DiT, SiT or LightningDiT.

    Raises:
        ValueError: a checkout is of none of them, or of one that is there already.
    """
    models = {}
    for path in checkouts:
        name = recognise(path).name
        if name not in CHECKOUT_MODELS:
            known = ", ".join(CHECKOUT_MODELS)
            raise ValueError(f"--checkout: expected one of {known}; got {path}, which is {name}")
        if name in models:
            raise ValueError(f"--checkout: expected one checkout of {name}, got two")
        models[name] = ["--checkout", str(path), *CHECKOUT_MODELS[name], *CHECKOUT_SIZE]
    models |= DIFFUSERS_MODELS
    # compiles every model while the tests run
    fill = Part(
        "fill",
        0,
        side_by_side([[*OTHER_MODELS, *options, "--untimed"] for options in models.values()]),
        environment={"TORCHINDUCTOR_COMPILE_THREADS": "2"},
    )
    tests = Part(
        "tests",
        90,
        pytest_command(*MODEL_TESTS),
        beside=fill,
        environment={"TRITON_CACHE_DIR": str(out / "test_caches")},
    )
    rows = ["--json", str(out / "rows.json"), "--budget", "0.4"]
    timed = [Part(name, 35, [*OTHER_MODELS, *rows, *models[name]]) for name in models]
    unmeasured = unmeasured_operators()
    ops = [Part("ops", 60, operators_command(out, "ours,compile", unmeasured))]
    return [*(ops if unmeasured else []), tests, *timed]


def dry_parts(which: str, out: Path) -> list[Part]:
    """The same programs at the smallest sizes, on a CPU."""
    rows = ["--device", "cpu", "--json", str(out / "rows.json")]
    if which == "models":
        model = [*OTHER_MODELS, *rows, "--budget", "0", "--model", "DiTTransformer2DModel"]
        return [
            Part("fill", 60, side_by_side([[*model, "--untimed"]])),
            Part("dit", 60, model),
        ]
    quick = ["--warmup", "1", "--steps", "1", "--profile", "0", "--shrink"]
    steps = [*STEPS, *rows, *quick]
    if which == "alignments":
        # four tokens, so that they can be cut into groups
        variants = ["--case", "SiT-S/4", "64", "2", "plain,dual_time"]
        return [Part("steps", 180, [*steps, *variants])]
    small = lambda variants: ["--case", "SiT-S/8", "64", "1", variants]
    ops = [*OPERATOR_RUN, *rows, "--ops", "gated_residual_adaln,noise_pair", "--budget", "0.002"]
    if which == "second":
        return [
            Part("steps", 230, [*steps, *small("plain,swap_ema")]),
            # only one operator: inductor's C++ compiles slowly
            Part("ops", 50, [*ops, "--ops", "noise_pair", "--variants", "ours,compile"]),
        ]
    fill_rows = ["--device", "cpu", "--json", str(out / "fill.json")]
    fill = Part("fill", 0, [*STEPS, *fill_rows, "--untimed", "--warmup", "1", *small("plain")])
    return [
        Part("ops", 45, [*ops, "--variants", "ours,eager"]),
        Part("steps", 90, [*steps, *small("plain,sra,plain,sra")]),
        Part("tests", 60, pytest_command("tests/test_conftest.py"), beside=fill),
    ]


def start(part: Part, log: Path, out: Path, device: str) -> subprocess.Popen:
    """Start a part in a process group, with its output in ``log``."""
    # rows would not show what the shell has set for the operators
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environ = {
        # pytest's width: the reason of a failure is cut off at the end of its line
        "COLUMNS": "160",
        **inherited,
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(out / "caches" / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(out / "caches" / "inductor"),
        **part.environment,
    }
    if device == "cpu":
        environ["CUDA_VISIBLE_DEVICES"] = ""
    with open(log, "w") as file:
        return subprocess.Popen(
            part.arguments,
            cwd=ROOT,
            env=environ,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run_part(part: Part, out: Path, seconds: float, device: str) -> list[dict]:
    """Run a part, and at the same time the program that needs no device.

    Args:
        part: to run.
        out: folder of the run.
        seconds: after which both are ended.
        device: "cpu" hides the GPUs.

    Returns:
        A record of each: command, exit code, seconds, whether it ran over, and the end of its log.
    """
    begin = time.perf_counter()
    end = begin + max(seconds, 0.1)
    log_of = lambda each: out / f"{each.name}.log"
    parts = [each for each in (part, part.beside) if each is not None]
    running = [(each, start(each, log_of(each), out, device)) for each in parts]
    found = []
    try:
        for each, process in running:
            ran_over = False
            try:
                process.wait(timeout=max(end - time.perf_counter(), 0.1))
            except subprocess.TimeoutExpired:
                ran_over = True
                end_group(process)
            record = {
                "part": each.name,
                "command": each.shown,
                "returncode": process.returncode,
                "ran_over": ran_over,
                "seconds": round(time.perf_counter() - begin, 1),
                "tail": log_of(each).read_text(errors="replace")[-TAIL:],
            }
            found.append(record)
    finally:
        # also after Ctrl-C
        for _, process in running:
            end_group(process)
    return found


def end_group(process: subprocess.Popen) -> None:
    """End a process and everything that it has started.

    It is interrupted first: pytest then prints what has failed so far, and launchers end their workers.
    Some shells make their children ignore that, so stronger signals follow.
    """
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + PATIENCE
        try:
            os.killpg(process.pid, signal_number)
            while time.monotonic() < deadline:
                process.poll()
                # signal 0 only asks whether any of the group is left
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            break
    process.wait()


def run_suite(which: str, parts: list[Part], out: Path, budget: float, device: str) -> list[dict]:
    """Run all parts and write summary.json and verdict.txt after each.

    A part may take its share of the time that is left.

    Args:
        which: "first" or "second".
        parts: in order.
        out: folder of the run.
        budget: seconds for all parts.
        device: "cpu" hides the GPUs.
    """
    where = environment(device, command_line("benchmarks.gpu_suite", sys.argv[1:]))
    found = []
    begin = time.perf_counter()
    for i, part in enumerate(parts):
        left = budget - (time.perf_counter() - begin)
        seconds = left * part.share / sum(later.share for later in parts[i:])
        print(f"{part.name}: at most {seconds:.0f} s", flush=True)
        for record in run_part(part, out, seconds, device):
            found.append(record)
            state = "ran over" if record["ran_over"] else f"exit code {record['returncode']}"
            tail = record["tail"].rstrip()[-SHOWN_TAIL:]
            print(f"{tail}\n{record['part']}: {state} after {record['seconds']} s", flush=True)
        summary = {**where, "suite": which, "parts": found}
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        (out / "verdict.txt").write_text(render(out, which))
    return found


def pack(out: Path, target: Path, names: list[str]) -> None:
    """Pack files and folders of ``out``. The archive is replaced in one go, so it is whole at any time."""
    partial = target.with_name(target.name + ".partial")
    # weak compression: the machine waits for it
    with tarfile.open(partial, "w:gz", compresslevel=1) as archive:
        for name in names:
            if (out / name).exists():
                archive.add(out / name, name)
    os.replace(partial, target)


def pack_results(out: Path, folder: Path) -> None:
    """Pack rows, logs, texts and clock readings into found.tgz."""
    suffixes = (".json", ".log", ".txt", ".csv")
    names = [path.name for path in out.iterdir() if path.is_file() and path.suffix in suffixes]
    pack(out, folder / "found.tgz", names)


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
            # a part may be replacing a file; the next round has it
            with contextlib.suppress(OSError):
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


def unpack_caches(caches: Path, out: Path) -> list[str]:
    """Unpack what first has packed, and return the tests that were red there."""
    with tarfile.open(caches) as archive:
        archive.extractall(out, filter="data")
    red = out / "red.txt"
    if not red.exists():
        return []
    return [name for name in red.read_text().split("\n") if name]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, with absolute paths. Paths that do not exist end the program with a message."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_out = ROOT / "runs" / "gpu_suite"
    budgets = ", ".join(f"{name} {seconds}" for name, seconds in BUDGETS.items())
    add = parser.add_argument
    add("which", choices=tuple(BUDGETS), help="the command")
    add("--out", type=Path, default=default_out, help="default: runs/gpu_suite")
    add("--budget", type=float, help=f"seconds for everything (default: {budgets})")
    add(
        "--checkout",
        type=Path,
        action="append",
        default=[],
        help="models: of DiT, SiT, .. (may be repeated)",
    )
    add("--published", type=Path, help="second: a checkout of the published code")
    add("--probe", type=Path, help="first: CUDA source to build and run with arguments 32 256")
    add("--caches", type=Path, help="caches.tgz that first or models has written, for this --out")
    add("--archive", type=Path, help="folder for found.tgz, renewed every 10 s, and caches.tgz")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run, smallest sizes")
    args = parser.parse_args(argv)
    for name in ("published", "probe", "caches"):
        given = getattr(args, name)
        if given is not None and not given.exists():
            parser.error(f"--{name}: expected a path that exists, got {given}")
    if args.budget is not None and args.budget <= 0:
        parser.error(f"--budget: expected seconds above 0, got {args.budget:g}")
    on_gpu = args.device == "cuda"
    if on_gpu and args.which == "models" and importlib.util.find_spec("diffusers") is None:
        parser.error("models needs diffusers: pip install diffusers")
    if args.checkout and args.which != "models":
        parser.error(f"--checkout: expected with models alone, got it with {args.which}")
    for path in args.checkout:
        if not path.exists():
            parser.error(f"--checkout: expected a path that exists, got {path}")
    # parts run in the root of the checkout
    args.checkout = [path.resolve() for path in args.checkout]
    for name in ("out", "published", "probe", "caches", "archive"):
        given = getattr(args, name)
        if given is not None:
            setattr(args, name, given.resolve())
    return args


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM acts like Ctrl-C, so that it also ends the parts.

    They are process groups of their own, which a signal to the suite does not reach.
    """

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def move_aside(out: Path, where: dict) -> Path | None:
    """Make room for a run: rows in ``out`` that another device or commit has left are moved away
    with everything beside them. A verdict would take them for this run's.

    Args:
        out: folder of the run.
        where: ``environment`` of this run.

    Returns:
        Where they are now; None: there were none.
    """
    file = out / "rows.json"
    if not file.exists():
        return None
    try:
        rows = json.loads(file.read_text())
        same = all(row[name] == where[name] for row in rows for name in ("device", "commit"))
    except (OSError, ValueError, LookupError, TypeError):
        # cut short by an earlier end
        same = False
    if same:
        return None
    number = 1
    while (target := out.with_name(f"{out.name}.{number}")).exists():
        number += 1
    out.rename(target)
    out.mkdir()
    return target


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 1 if a part failed, or 2 without a GPU."""
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: --device cpu is a dry run", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    if moved := move_aside(args.out, environment(args.device, "")):
        print(f"rows of another device or commit: {args.out} is moved to {moved}", flush=True)
    red = unpack_caches(args.caches, args.out) if args.caches else []
    if args.device == "cpu":
        parts = dry_parts(args.which, args.out)
    elif args.which == "first":
        parts = first_parts(args.out, str(args.probe) if args.probe else None)
    elif args.which == "alignments":
        parts = alignments_parts(args.out)
    elif args.which == "models":
        try:
            parts = models_parts(args.out, args.checkout)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    else:
        parts = second_parts(args.out, str(args.published) if args.published else None, red)

    # the verdict's predictions take a few seconds of a core; the first part hides them
    threading.Thread(target=predicted_rows, daemon=True).start()
    with archived(args.out, args.archive), interrupted_by_sigterm():
        budget = args.budget or BUDGETS[args.which]
        found = run_suite(args.which, parts, args.out, budget, args.device)
        if args.which != "second":
            # for second, or for the same command on another machine
            (args.out / "red.txt").write_text("\n".join(failed_tests(args.out / "tests.log")))
            pack(args.out, args.out / "caches.tgz", ["caches", "red.txt"])
    print((args.out / "verdict.txt").read_text())
    return 1 if any(part["returncode"] for part in found) else 0


if __name__ == "__main__":
    sys.exit(main())
