"""What a run of the suite says, in words that a person understands:  python benchmarks/verdict.py DIR

Operators and tests right or wrong, every goal beside what was measured, what the host and the card did, where the time goes.
"""

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0:0] = [str(ROOT), str(ROOT / "benchmarks")]

from scaling import predicted  # noqa: E402
from variants import PROGRAMS, Variant  # noqa: E402

MODEL, PIXELS, SMALL_MODEL = "SiT-XL/2", 256, "SiT-B/2"
NOT_RUN = "not run"
# images/s of one GPU in training a model of XL/2's size at 256 px, as these works report it: other GPUs and other software, to be
# looked at beside the rows and never as a measurement of ours
PUBLISHED = {
    "LightningDiT, H800 (arXiv 2501.01423)": 285,
    "SRA 2 (arXiv 2601.17830)": 230,
    "REPA (arXiv 2410.06940)": 173,
}
# kinds of rows whose time is no operator's
CEILINGS = ("copy", "matmul")


class Rows:
    """Rows of one machine, looked up by what they measure."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def step(self, variant: str, batch: int, model: str = MODEL) -> dict | None:
        """The fastest step of a variant: this engine may choose what it recomputes, a rival everything, and fewer images
        where these do not fit."""
        rival = variant in PROGRAMS
        mine = [
            row
            for row in self.rows
            if (row["kind"], row["name"], row.get("model"), row.get("resolution"))
            == ("train_step", "step", model, PIXELS)
            and row["variant"].partition("+" if rival else "+train.recompute=")[0] == variant
            and (batch // 2 <= row["batch"] <= batch if rival else row["batch"] == batch)
        ]
        return max(mine, key=lambda row: (row["batch"], -row["ms"]), default=None)

    def operator(self, name: str, variant: str = "ours", batch: int | None = 32) -> dict | None:
        """A row of an operator; one without ``ms`` was wrong."""
        key = ("op", name, variant, MODEL, batch)
        found = (
            row
            for row in self.rows
            if tuple(row.get(k) for k in ("kind", "name", "variant", "model", "batch")) == key
        )
        return next(found, None)

    def parts(self, kind: str, variant: str, batch: int) -> dict[str, float]:
        """Milliseconds of a step's parts: its families of kernels (``kernel_share``), what the host takes (``host``)."""
        key = (kind, variant, MODEL, batch)
        fields = ("kind", "variant", "model", "batch")
        return {
            row["name"]: row["ms"] for row in self.rows if tuple(row.get(k) for k in fields) == key
        }


def rate(row: dict | None) -> float | None:
    return None if row is None else row["images_per_s"]


def faster(a: dict | None, b: dict | None) -> float | None:
    """How many times as many images per second ``a`` takes as ``b``."""
    return None if a is None or b is None else a["images_per_s"] / b["images_per_s"]


def quotient(a: dict | None, b: dict | None) -> float | None:
    """Time of ``a`` over time of ``b``."""
    return None if a is None or b is None or "ms" not in a or "ms" not in b else a["ms"] / b["ms"]


def memory_over_plain(rows: Rows) -> float | None:
    a, b = rows.step("sra", 32), rows.step("plain", 32)
    return (
        None
        if a is None or b is None or "peak_bytes" not in a
        else (a["peak_bytes"] - b["peak_bytes"]) / 1e9
    )


def of_copy(name: str, batch: int | None = 32) -> Callable[[Rows], float | None]:
    return lambda rows: (rows.operator(name, batch=batch) or {}).get("percent_of_ceiling")


def over_bytes(rows: Rows) -> float | None:
    """Time of the optimizer's pass over that of its bytes at the copy's bandwidth."""
    percent = of_copy("adamw_ema_", None)(rows)
    return None if percent is None else 100 / percent


@dataclass(frozen=True)
class Goal:
    """A number that the project wants to reach; ``value`` is None where the rows do not hold it."""

    name: str
    value: Callable[[Rows], float | None]
    bound: float
    at_most: bool = False
    unit: str = ""

    def line(self, rows: Rows, predicted: Rows) -> str:
        number = lambda value: f"{value:.{3 if abs(value) < 10 else 1}f}{self.unit}"
        value, guess = self.value(rows), self.value(predicted)
        goal = f"goal {'<=' if self.at_most else '>='} {self.bound:g}{self.unit}"
        said = f", predicted {number(guess)}" if guess is not None else ""
        if value is None:
            return f"{self.name:46} {NOT_RUN:>10}   {goal}{said}"
        met = value <= self.bound if self.at_most else value >= self.bound
        return f"{self.name:46} {number(value):>10}   {goal}, {'met' if met else 'MISSED'}{said}"


GOALS = (
    Goal("SRA over plain, 32 images (time)", lambda r: quotient(r.step("sra", 32), r.step("plain", 32)), 1.18, at_most=True),
    Goal("SRA with fp8 teacher over plain, 32", lambda r: quotient(r.step("sra_fp8", 32), r.step("plain", 32)), 1.13, at_most=True),
    Goal("SRA over plain, 256 images (time)", lambda r: quotient(r.step("sra", 256), r.step("plain", 256)), 1.18, at_most=True),
    Goal("images/s with SRA, 32 images", lambda r: rate(r.step("sra", 32)), 460),
    Goal("images/s with SRA, 256 images", lambda r: rate(r.step("sra", 256)), 560),
    Goal("SRA over strong, 32 images", lambda r: faster(r.step("sra", 32), r.step("strong", 32)), 1.10),
    Goal("SRA over strong, 256 images (or what fits it)", lambda r: faster(r.step("sra", 256), r.step("strong", 256)), 1.05),
    Goal("SRA over the published code, 32", lambda r: faster(r.step("sra", 32), r.step("reference", 32)), 4),
    Goal("SRA over swap_ema, 32", lambda r: faster(r.step("sra", 32), r.step("swap_ema", 32)), 1.5),
    Goal("images/s of B/2 with SRA, 256", lambda r: rate(r.step("sra", 256, SMALL_MODEL)), 2000),
    Goal("half-block backward over torch.compile's",
         lambda r: quotient(r.operator("gated_residual_adaln.backward", "compile"), r.operator("gated_residual_adaln.backward")), 1.3),
    Goal("half-block backward, of the copy's bandwidth", of_copy("gated_residual_adaln.backward"), 85, unit=" %"),
    Goal("adamw_ema_ over its bytes", over_bytes, 1.15, at_most=True),
    Goal("memory over plain, 32 images", memory_over_plain, 6, at_most=True, unit="GB"),
)  # fmt: skip


@functools.cache
def predicted_rows() -> Rows:
    """Steps of this engine as ``scaling.predicted`` has them, before anything is measured."""
    rows = []
    for model, batch in ((MODEL, 32), (MODEL, 256), (SMALL_MODEL, 256)):
        for name in ("plain", "sra", "sra_fp8"):
            times = predicted(Variant.parse(name).configuration(model, PIXELS, batch, "cuda"))
            seconds = times.forward + times.teacher + times.backward + times.optimizer + times.other
            case = {
                "kind": "train_step",
                "name": "step",
                "variant": name,
                "model": model,
                "resolution": PIXELS,
                "batch": batch,
            }
            rows.append({**case, "ms": 1e3 * seconds, "images_per_s": batch / seconds})
    return Rows(rows)


def test_results(log: Path) -> dict[str, set[str]]:
    """``{outcome: names}`` from pytest's own lines (-v, with or without workers), also of a run that was cut short."""
    found: dict[str, set[str]] = {"PASSED": set(), "FAILED": set(), "ERROR": set()}
    if not log.exists():
        return found
    for line in log.read_text(errors="replace").splitlines():
        # "[gw1] [ 10%] PASSED tests/a.py::b", "tests/a.py::b PASSED [ 10%]", "FAILED tests/a.py::b - AssertionError"
        match = re.match(
            r"(?:\[gw\d+\] \[ *\d+%\] )?(PASSED|FAILED|ERROR) (tests/\S+::.+?)(?: - .*)?$", line
        )
        match = match or re.match(
            r"(?P<name>tests/\S+::.+?) (?P<outcome>PASSED|FAILED|ERROR)\b", line
        )
        if match:
            groups = match.groupdict() or dict(
                zip(("outcome", "name"), match.groups(), strict=True)
            )
            found[groups["outcome"]].add(groups["name"].strip())
    return found


def failed_tests(log: Path) -> list[str]:
    found = test_results(log)
    return sorted(found["FAILED"] | found["ERROR"])


def operators(rows: list[dict]) -> list[str]:
    mine = [
        row
        for row in rows
        if row["kind"] == "op" and row["variant"] == "ours" and row["name"] not in CEILINGS
    ]
    if not mine:
        return [f"operators: {NOT_RUN}"]
    wrong = sorted({row["name"] for row in mine if "ms" not in row})
    lines = [
        f"operators: {len({row['name'] for row in mine}) - len(wrong)} right, {len(wrong)} wrong"
        + (": " + ", ".join(wrong) if wrong else "")
    ]
    for row in mine:
        if "ms" in row:
            case = " ".join(str(row[k]) for k in ("model", "batch") if k in row)
            lines.append(
                f"  {row['name']:34} {case:14} {1e3 * row['ms']:9.1f} us {row['percent_of_ceiling']:6.1f} % of the ceiling"
            )
    return lines


def tests(log: Path) -> list[str]:
    found, red = test_results(log), failed_tests(log)
    if not log.exists():
        return [f"tests: {NOT_RUN}"]
    # pytest's last line; without it there were more
    ended = re.search(
        r"^=+ .*(passed|failed|error).* in [\d.]+s", log.read_text(errors="replace"), re.MULTILINE
    )
    cut = "" if ended else ", CUT SHORT: the others were not run"
    return [
        f"tests: {len(found['PASSED'] - set(red))} passed, {len(red)} failed{cut}",
        *(f"  RED {name}" for name in red),
    ]


def steps(rows: list[dict]) -> list[str]:
    lines = []
    for row in rows:
        if row["kind"] != "train_step" or row["name"] != "step":
            continue
        mfu = (
            f" MFU {100 * row['mfu']:.1f} %, with teacher {100 * row['mfu_with_teacher']:.1f} %"
            if "mfu" in row
            else ""
        )
        memory = f" {row['peak_bytes'] / 1e9:.1f} GB" if "peak_bytes" in row else ""
        clock = (
            f" at {row['sm_mhz']:.0f} MHz, {row['watts']:.0f} W"
            if "sm_mhz" in row and "watts" in row
            else ""
        )
        held = f" ({row['throttled']})" if "throttled" in row else ""
        spread = f" +-{50 * row['spread']:.1f} %" if "spread" in row else ""
        lines.append(
            f"  {row['model']} {row['batch']:4} {row['variant']:34} {row['ms']:8.2f} ms{spread} {row['images_per_s']:7.1f}/s{mfu}{memory}{clock}{held}"
        )
    published = ", ".join(f"{name} {rate}/s" for name, rate in PUBLISHED.items())
    return lines and ["steps:", *lines, f"  reported elsewhere, not measured here: {published}"]


def host_and_kernels(rows: Rows) -> list[str]:
    step, host, kernels = (
        rows.step("sra", 32),
        rows.parts("host", "sra", 32),
        rows.parts("kernel_share", "sra", 32),
    )
    lines = []
    if step and "step" in host:
        hidden = "hidden" if host["step"] < step["ms"] else "NOT hidden"
        lines.append(
            f"host: {host['step']:.1f} ms per step of {step['ms']:.1f} ms, {hidden}; start-up {host['start-up'] / 1e3:.1f} s"
        )
    if kernels:
        slowest = sorted(kernels.items(), key=lambda item: -item[1])[:5]
        lines.append(
            "slowest kernel families of sra, 32 images: "
            + ", ".join(f"{name} {ms:.1f} ms" for name, ms in slowest)
        )
    return lines


def render(folder: Path, which: str = "") -> str:
    """The verdict on what the folder holds so far."""
    path = folder / "rows.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    where = next(
        (
            f"{row['device']}, torch {row['versions']['torch']}, commit {row['commit']}"
            for row in rows
        ),
        "nothing measured",
    )
    copy = next((f", copy {row['gbps']:.0f} GB/s" for row in rows if row["name"] == "copy"), "")
    lines = [
        f"VERDICT {which}: {where}{copy}",
        *operators(rows),
        *tests(folder / "tests.log"),
        *steps(rows),
    ]
    lines += [
        *host_and_kernels(Rows(rows)),
        "goals:",
        *("  " + goal.line(Rows(rows), predicted_rows()) for goal in GOALS),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="that the suite has written")
    print(render(parser.parse_args(argv).folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
