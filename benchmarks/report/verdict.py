"""Say what a run of the GPU suite has found: python -m benchmarks.report.verdict DIR

Operators and tests that are right or wrong, every goal and its measured value, whether the host kept up, clocks and
power of the card, and the slowest kernels.
"""

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cost_model.one_gpu import predicted
from benchmarks.record import RUN, read_rows
from benchmarks.report.table import chooses_freely
from benchmarks.step.variants import PROGRAMS, PUBLISHED, Variant

MODEL = "SiT-XL/2"
PIXELS = 256
SMALL_MODEL = "SiT-B/2"
NOT_RUN = "not run"

# images/s of one GPU, training a model of XL/2's size at 256 px, as these papers report it. Other GPUs and other
# software: context for the rows, not a measurement of ours
REPORTED_ELSEWHERE = {
    "LightningDiT, H800 (arXiv 2501.01423)": 285,
    "SRA 2 (arXiv 2601.17830)": 230,
    "REPA (arXiv 2410.06940)": 173,
}
# rows of the kind "op" that are no operators
CEILINGS = ("copy", "matmul")


def _matches(row: dict, **wanted) -> bool:
    return all(row.get(field) == value for field, value in wanted.items())


class Rows:
    """Rows of one machine, looked up by what they measure."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def step(self, variant: str, batch: int, model: str = MODEL) -> dict | None:
        """The fastest step of a variant, or None.

        This engine may choose what it recomputes. A rival may choose its switches, and half of the
        images if it does not fit with all of them.
        """
        # the published code runs at the batch that it is given
        least_batch = batch // 2 if variant in PROGRAMS else batch
        case = {"kind": "train_step", "name": "step", "model": model, "resolution": PIXELS}
        candidates = [
            row
            for row in self.rows
            if _matches(row, **case)
            and chooses_freely(row["variant"], variant)
            and least_batch <= row["batch"] <= batch
        ]
        return max(candidates, key=lambda row: (row["batch"], -row["ms"]), default=None)

    def operator(self, name: str, variant: str = "ours", batch: int | None = 32) -> dict | None:
        """A row of an operator, or None. A row without ``ms`` was wrong or failed."""
        case = {"kind": "op", "name": name, "variant": variant, "model": MODEL, "batch": batch}
        return next((row for row in self.rows if _matches(row, **case)), None)

    def parts(self, kind: str, variant: str, batch: int) -> dict[str, float]:
        """Milliseconds of the parts of a step.

        Args:
            kind: "kernel_share" for the families of kernels, "host" for the host's time.
            variant: of the step.
            batch: images.
        """
        case = {"kind": kind, "variant": variant, "model": MODEL, "batch": batch}
        return {row["name"]: row["ms"] for row in self.rows if _matches(row, **case)}


# values of goals; None where the rows do not hold them


def _time_ratio(a: dict | None, b: dict | None) -> float | None:
    """Time of ``a`` over time of ``b``."""
    if a is None or b is None or "ms" not in a or "ms" not in b:
        return None
    return a["ms"] / b["ms"]


def time_over_plain(variant: str, batch: int) -> Callable[["Rows"], float | None]:
    """Step time over that of ``plain``."""
    return lambda rows: _time_ratio(rows.step(variant, batch), rows.step("plain", batch))


def images_per_second(batch: int, model: str = MODEL) -> Callable[["Rows"], float | None]:
    """Of a step with SRA."""

    def value(rows: Rows) -> float | None:
        row = rows.step("sra", batch, model)
        return None if row is None else row["images_per_s"]

    return value


def faster_than(rival: str, batch: int) -> Callable[["Rows"], float | None]:
    """Images per second with SRA over those of a rival."""

    def value(rows: Rows) -> float | None:
        ours = rows.step("sra", batch)
        theirs = rows.step(rival, batch)
        if ours is None or theirs is None:
            return None
        return ours["images_per_s"] / theirs["images_per_s"]

    return value


def operator_speedup(name: str) -> Callable[["Rows"], float | None]:
    """Time of torch.compile's code over ours."""
    return lambda rows: _time_ratio(rows.operator(name, "compile"), rows.operator(name))


def percent_of_copy(name: str, batch: int | None = 32) -> Callable[["Rows"], float | None]:
    """Percentage of the copy bandwidth that an operator reaches."""

    def value(rows: Rows) -> float | None:
        row = rows.operator(name, batch=batch)
        return None if row is None else row.get("percent_of_ceiling")

    return value


def update_over_its_bytes(rows: Rows) -> float | None:
    """Time of the optimizer's pass over that of its bytes at the copy bandwidth."""
    percent = percent_of_copy("adamw_ema_", None)(rows)
    return None if percent is None else 100 / percent


def memory_over_plain(rows: Rows) -> float | None:
    """Peak memory of a step with SRA beyond that of a plain one, GB."""
    sra = rows.step("sra", 32)
    plain = rows.step("plain", 32)
    if sra is None or plain is None or "peak_bytes" not in sra:
        return None
    return (sra["peak_bytes"] - plain["peak_bytes"]) / 1e9


@dataclass(frozen=True)
class Goal:
    """A number that the project wants to reach.

    Attributes:
        name: what it is.
        value: takes ``Rows``; None where they do not hold it.
        bound: to reach.
        at_most: whether smaller is better.
        unit: printed after the number.
    """

    name: str
    value: Callable[[Rows], float | None]
    bound: float
    at_most: bool = False
    unit: str = ""

    def line(self, rows: Rows, prediction: Rows) -> str:
        """Value, goal, met or missed, and the value that was predicted where there is one."""
        goal = f"goal {'<=' if self.at_most else '>='} {self.bound:g}{self.unit}"
        guess = self.value(prediction)
        said = "" if guess is None else f", predicted {self._number(guess)}"
        value = self.value(rows)
        if value is None:
            return f"{self.name:46} {NOT_RUN:>10}   {goal}{said}"
        met = value <= self.bound if self.at_most else value >= self.bound
        state = "met" if met else "MISSED"
        return f"{self.name:46} {self._number(value):>10}   {goal}, {state}{said}"

    def _number(self, value: float) -> str:
        digits = 3 if abs(value) < 10 else 1
        return f"{value:.{digits}f}{self.unit}"


HALF_BLOCK = "gated_residual_adaln.backward"
GOALS = (
    Goal("SRA over plain, 32 images (time)", time_over_plain("sra", 32), 1.18, at_most=True),
    Goal("SRA with fp8 teacher over plain, 32", time_over_plain("sra_fp8", 32), 1.13, at_most=True),
    Goal("SRA over plain, 256 images (time)", time_over_plain("sra", 256), 1.18, at_most=True),
    Goal("images/s with SRA, 32 images", images_per_second(32), 460),
    Goal("images/s with SRA, 256 images", images_per_second(256), 560),
    Goal("SRA over strong, 32 images", faster_than("strong", 32), 1.10),
    Goal("SRA over strong, 256 images (or what fits it)", faster_than("strong", 256), 1.05),
    Goal("SRA over the published code, 32", faster_than(PUBLISHED, 32), 4),
    Goal("SRA over swap_ema, 32", faster_than("swap_ema", 32), 1.5),
    Goal("images/s of B/2 with SRA, 256", images_per_second(256, SMALL_MODEL), 2000),
    Goal("half-block backward over torch.compile's", operator_speedup(HALF_BLOCK), 1.3),
    Goal(
        "half-block backward, of the copy's bandwidth", percent_of_copy(HALF_BLOCK), 85, unit=" %"
    ),
    Goal("adamw_ema_ over its bytes", update_over_its_bytes, 1.15, at_most=True),
    Goal("memory over plain, 32 images", memory_over_plain, 6, at_most=True, unit="GB"),
)


@functools.cache
def predicted_rows() -> Rows:
    """Steps of this engine as ``one_gpu.predicted`` has them, for comparison with what is measured."""
    rows = []
    for model, batch in ((MODEL, 32), (MODEL, 256), (SMALL_MODEL, 256)):
        for name in ("plain", "sra", "sra_fp8"):
            cfg = Variant.parse(name).configuration(model, PIXELS, batch, "cuda")
            seconds = predicted(cfg).total
            row = {
                "kind": "train_step",
                "name": "step",
                "variant": name,
                "model": model,
                "resolution": PIXELS,
                "batch": batch,
                "ms": 1e3 * seconds,
                "images_per_s": batch / seconds,
            }
            rows.append(row)
    return Rows(rows)


# pytest's lines: "[gw1] [ 10%] PASSED tests/a.py::b", "FAILED tests/a.py::b - AssertionError", and
# "ERROR tests/a.py - ImportError" for a file that cannot be imported
OUTCOME_FIRST = re.compile(
    r"(?:\[gw\d+\] \[ *\d+%\] )?"
    r"(?P<outcome>PASSED|FAILED|ERROR) (?P<name>tests/[^\s:]+(?:::.+?)?)(?: - .*)?\s*$"
)
# "tests/a.py::b PASSED [ 10%]"
NAME_FIRST = re.compile(r"(?P<name>tests/\S+::.+?) (?P<outcome>PASSED|FAILED|ERROR)\b")
# the last line, which a run that was killed does not have
LAST_LINE = re.compile(r"^=+ .*(passed|failed|skipped|error).* in [\d.]+s.*", re.MULTILINE)
HEADING = re.compile(r"^=+ .* =+$", re.MULTILINE)
# a run that was stopped has the last line too, and one of these under the last heading before it:
# "!!! KeyboardInterrupt !!!", "!!! xdist.dsession.Interrupted: session interrupted !!!"
STOPPED = re.compile(
    r"^!+ .*(KeyboardInterrupt|Interrupted|Exit|stopping after).* !+$", re.MULTILINE
)
# pytest's exit codes of a run that reached its end: all passed, some failed, none were chosen
RAN_TO_THE_END = (0, 1, 5)


def outcomes(log: Path) -> dict[str, set[str]]:
    """``{outcome: names}`` from pytest's output with -v, also of a run that was cut short."""
    found: dict[str, set[str]] = {"PASSED": set(), "FAILED": set(), "ERROR": set()}
    if not log.exists():
        return found
    for line in log.read_text(errors="replace").splitlines():
        match = OUTCOME_FIRST.match(line) or NAME_FIRST.match(line)
        if match:
            found[match["outcome"]].add(match["name"].strip())
    return found


def failed_tests(log: Path) -> list[str]:
    """Names of the tests that failed or had an error."""
    found = outcomes(log)
    return sorted(found["FAILED"] | found["ERROR"])


def was_cut_short(text: str, part: dict | None = None) -> bool:
    """Whether some tests were not run.

    Args:
        text: pytest's output.
        part: the suite's record of the run, if there is one.
    """
    if part and (part.get("ran_over") or part.get("returncode", 0) not in RAN_TO_THE_END):
        return True
    lines = list(LAST_LINE.finditer(text))
    if not lines:
        return True
    # failed tests may have printed the lines of a pytest of their own further up
    above = HEADING.split(text[: lines[-1].start()])[-1]
    return STOPPED.search(above) is not None


def num_errors(text: str) -> int | None:
    """Errors by pytest's last line; None without that line."""
    lines = list(LAST_LINE.finditer(text))
    if not lines:
        return None
    count = re.search(r"(\d+) errors?\b", lines[-1][0])
    return int(count[1]) if count else 0


def test_lines(log: Path, part: dict | None = None) -> list[str]:
    """How many tests passed and failed, how many errors there were, and the names of those.

    Args:
        log: pytest's output.
        part: the suite's record of the run, if there is one.
    """
    if not log.exists():
        return [f"tests: {NOT_RUN}"]
    text = log.read_text(errors="replace")
    found = outcomes(log)
    red = failed_tests(log)
    # an error at teardown follows a PASSED of the same test
    passed = found["PASSED"] - set(red)
    counts = f"tests: {len(passed)} passed, {len(found['FAILED'])} failed"
    # without pytest's own count, as many as are named
    errors = num_errors(text)
    if errors is None:
        errors = len(found["ERROR"])
    if errors:
        counts += f", {errors} error" + ("s" if errors > 1 else "")
    if was_cut_short(text, part):
        counts += ", CUT SHORT: the others were not run"
    return [counts, *(f"  RED {name}" for name in red)]


def operator_lines(rows: list[dict]) -> list[str]:
    """How many operators are right and wrong, and the time of each."""
    ours = [
        row
        for row in rows
        if row["kind"] == "op" and row["variant"] == "ours" and row["name"] not in CEILINGS
    ]
    if not ours:
        return [f"operators: {NOT_RUN}"]
    names = {row["name"] for row in ours}
    wrong = sorted({row["name"] for row in ours if "ms" not in row})
    summary = f"operators: {len(names) - len(wrong)} right, {len(wrong)} wrong"
    if wrong:
        summary += ": " + ", ".join(wrong)
    lines = [summary]
    for row in ours:
        if "ms" not in row:
            continue
        case = " ".join(str(row[k]) for k in ("model", "batch") if k in row)
        lines.append(
            f"  {row['name']:34} {case:14} {1e3 * row['ms']:9.1f} us "
            f"{row['percent_of_ceiling']:6.1f} % of the ceiling"
        )
    return lines


def _step_line(row: dict) -> str:
    """Time, rate, MFU, memory, clock and power of one step, as far as they are known."""
    words = [f"  {row['model']} {row['batch']:4} {row['variant']:34} {row['ms']:8.2f} ms"]
    if "spread" in row:
        # half of the spread to either side
        words.append(f"+-{50 * row['spread']:.1f} %")
    words.append(f"{row['images_per_s']:7.1f}/s")
    if "mfu" in row:
        words.append(
            f"MFU {100 * row['mfu']:.1f} %, with teacher {100 * row['mfu_with_teacher']:.1f} %"
        )
    if "peak_bytes" in row:
        words.append(f"{row['peak_bytes'] / 1e9:.1f} GB")
    if "sm_mhz" in row and "watts" in row:
        words.append(f"at {row['sm_mhz']:.0f} MHz, {row['watts']:.0f} W")
    if "throttled" in row:
        words.append(f"({row['throttled']})")
    return " ".join(words)


def step_lines(rows: list[dict]) -> list[str]:
    """A line per step, then the rates that others report; empty if no step was measured."""
    steps = [row for row in rows if _matches(row, kind="train_step", name="step")]
    if not steps:
        return []
    reported = ", ".join(f"{name} {rate}/s" for name, rate in REPORTED_ELSEWHERE.items())
    return [
        "steps:",
        *(_step_line(row) for row in steps),
        f"  reported elsewhere, not measured here: {reported}",
    ]


def host_and_kernel_lines(rows: Rows) -> list[str]:
    """Whether the host runs ahead of the device, and the slowest families of kernels."""
    step = rows.step("sra", 32)
    host = rows.parts("host", "sra", 32)
    kernels = rows.parts("kernel_share", "sra", 32)
    lines = []
    if step and "step" in host:
        # Python costs nothing as long as it launches steps faster than they run
        hidden = "hidden" if host["step"] < step["ms"] else "NOT hidden"
        lines.append(
            f"host: {host['step']:.1f} ms per step of {step['ms']:.1f} ms, {hidden}; "
            f"start-up {host['start-up'] / 1e3:.1f} s"
        )
    if kernels:
        slowest = sorted(kernels.items(), key=lambda item: -item[1])[:5]
        words = ", ".join(f"{name} {ms:.1f} ms" for name, ms in slowest)
        lines.append(f"slowest kernel families of sra, 32 images: {words}")
    return lines


def model_lines(rows: list[dict]) -> list[str]:
    """Other people's models, forward and backward: what our line gains over torch.compile."""
    ms: dict[str, dict[str, float | None]] = {}
    for row in rows:
        if row["kind"] == "model" and row["name"] == "both":
            case = f"{row['model']}, {row['resolution']} px, batch {row['batch']}, {row['dtype']}"
            ms.setdefault(case, {})[row["variant"]] = row.get("ms")
    lines = []
    for model, found in ms.items():
        words = [
            f"{variant} {time:.2f} ms" if time is not None else f"{variant} FAILED"
            for variant, time in found.items()
        ]
        ours = found.get("ours")
        compiled = found.get("compile")
        ratio = f", {compiled / ours:.2f}x of torch.compile" if ours and compiled else ""
        lines.append(f"  {model}: {', '.join(words)}{ratio}")
    return ["other people's models, forward and backward:", *lines] if lines else []


def read_summary(path: Path) -> dict:
    """What the suite has written of its run; empty if it has not, or was killed while writing."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def of_one_run(rows: list[dict], summary: dict) -> list[dict]:
    """The rows of this run: those with its device, commit and versions.

    The suite's summary says which these are; without one, the newest row does. A folder may also
    hold rows of older runs, and a verdict must not mix them.
    """
    if not rows:
        return []
    newest = max(enumerate(rows), key=lambda item: (item[1].get("date", ""), item[0]))[1]
    run = summary if set(RUN) <= set(summary) else newest
    return [row for row in rows if all(row[name] == run[name] for name in RUN)]


def render(folder: Path, which: str = "") -> str:
    """The verdict on what a folder holds so far.

    Args:
        folder: that the suite has written: rows.json, tests.log and summary.json, if they exist.
        which: the suite's command, for the title.
    """
    title = "nothing measured"
    notes = []
    everything = []
    try:
        everything = read_rows(folder / "rows.json")
    except ValueError as error:
        # the tests have their verdict all the same
        notes.append(str(error))
    summary = read_summary(folder / "summary.json")
    rows = of_one_run(everything, summary)
    if others := len(everything) - len(rows):
        notes.append(f"left out: {others} rows of runs with another device, commit or versions")
    parts = {part["part"]: part for part in summary.get("parts", [])}
    if rows:
        first = rows[0]
        torch_version = first["versions"]["torch"]
        title = f"{first['device']}, torch {torch_version}, commit {first['commit']}"
    for row in rows:
        # a family of kernels is called "copy" too, and has no bandwidth
        if row["name"] == "copy" and "gbps" in row:
            title += f", copy {row['gbps']:.0f} GB/s"
            break
    goals = ["  " + goal.line(Rows(rows), predicted_rows()) for goal in GOALS]
    lines = [
        f"VERDICT {which}: {title}",
        *notes,
        *operator_lines(rows),
        *test_lines(folder / "tests.log", parts.get("tests")),
        *step_lines(rows),
        *model_lines(rows),
        *host_and_kernel_lines(Rows(rows)),
        "goals:",
        *goals,
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the suite's --out")
    print(render(parser.parse_args(argv).folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
