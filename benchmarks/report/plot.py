"""Draw the pictures of the documents from the newest rows of a GPU: python -m benchmarks.report.plot"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.record import ROOT, in_file_name, load_results
from benchmarks.report.table import (
    case_of,
    in_table_dtype,
    most_valuable_case,
    newest_rows,
    newest_runs,
)
from benchmarks.report.verdict import MODEL, PIXELS, REPORTED_ELSEWHERE
from benchmarks.step.variants import LADDER, is_depth, teacher_share

# files only, no window
plt.switch_backend("Agg")

IMAGES = ROOT / "docs" / "images"


def draw_operators(rows: list[dict], path: Path) -> None:
    """A group of bars per operator: every variant's percentage of the copy bandwidth.

    Shape and dtype are those of the table of operators: the most valuable shape that was
    measured, in bf16.
    """
    rows = [
        row for row in rows if row["kind"] == "op" and "percent_of_ceiling" in row and "gbps" in row
    ]
    bars: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        for row in _rows_of_one_case([row for row in rows if row["name"] == name]):
            # rows come newest first, so the first one counts
            bars.setdefault(name, {}).setdefault(row["variant"], row["percent_of_ceiling"])
    variants = list(dict.fromkeys(v for values in bars.values() for v in values))
    num_variants = max(len(variants), 1)

    figure, axes = plt.subplots(figsize=(8, 0.5 + 0.18 * max(len(bars), 4) * num_variants))
    height = 0.8 / num_variants
    for i, variant in enumerate(variants):
        groups = [(k, values) for k, values in enumerate(bars.values()) if variant in values]
        positions = [k + i * height for k, _ in groups]
        widths = [values[variant] for _, values in groups]
        axes.barh(positions, widths, height, label=variant)
    axes.set_yticks([k + 0.4 - height / 2 for k in range(len(bars))], list(bars))
    axes.invert_yaxis()
    # the copy bandwidth itself
    axes.axvline(100, color="gray", linewidth=0.8)
    device = f", {rows[0]['device']}" if rows else ""
    axes.set_xlabel("percent of the copy bandwidth" + device)
    if variants:
        axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _rows_of_one_case(rows: list[dict]) -> list[dict]:
    """Those rows of an operator that may be compared: of one shape and one dtype."""
    # a run in another dtype has a picture of its own
    shown = [row for row in rows if in_table_dtype(row)]
    shown = shown or [row for row in rows if row.get("dtype") == rows[0].get("dtype")]
    # a shape without ours says nothing of it
    ours = [row for row in shown if row["variant"] == "ours"]
    best = most_valuable_case(ours or shown)
    return [row for row in shown if case_of(row) == best]


def draw_steps(rows: list[dict], path: Path) -> None:
    """Milliseconds of a step, and what the teacher's depth costs.

    Left: every variant of the case with the most rungs of the ladder, with the rates that others report.
    Right, where the teacher's depth was varied: the time over plain against the teacher's share n/L.
    """
    steps = [row for row in rows if row["kind"] == "train_step" and row["name"] == "step"]
    cases: dict[tuple, dict[str, float]] = {}
    for row in steps:
        case = (row["model"], row["resolution"], row["batch"])
        cases.setdefault(case, {})[row["variant"]] = row["ms"]
    title = lambda case: f"{case[0]} {case[1]} px, {case[2]} images"

    curves = {}
    for case, times in cases.items():
        depths = [name for name in times if is_depth(name)]
        # (n/L, ms), from the shallowest teacher to the deepest
        points = sorted((teacher_share(name, case[0]), times[name]) for name in depths)
        if "plain" in times and len(points) > 1:
            curves[title(case)] = [(share, ms / times["plain"]) for share, ms in points]

    columns = 2 if curves else 1
    width = 11 if curves else 7
    figure, axes = plt.subplots(1, columns, figsize=(width, 4), squeeze=False)
    if cases:
        case = _highest_case(cases)
        _draw_bars(axes[0, 0], cases[case], case)
        axes[0, 0].set_title(f"{title(case)}\n{steps[0]['device']}")
    for label, points in curves.items():
        axes[0, 1].plot(*zip(*points, strict=True), marker="o", label=label)
        axes[0, 1].legend()
        axes[0, 1].set_xlabel("teacher's blocks over all blocks, n/L")
        axes[0, 1].set_ylabel("time over plain")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _highest_case(cases: dict[tuple, dict[str, float]]) -> tuple:
    """The case with the most rungs of the ladder, then with the most variants."""
    return max(cases, key=lambda case: (len(set(LADDER) & set(cases[case])), len(cases[case])))


def _draw_bars(axes, times: dict[str, float], case: tuple) -> None:
    """The rungs of the ladder in its order, then the other variants, the slowest first."""
    rungs = [name for name in LADDER if name in times]
    others = sorted((name for name in times if name not in LADDER), key=lambda name: -times[name])
    names = rungs + others
    bars = axes.barh(names, [times[name] for name in names])
    axes.bar_label(bars, fmt="%.0f", padding=2, fontsize="x-small")
    model, pixels, batch = case
    if (model, pixels) == (MODEL, PIXELS):
        for (name, rate), style in zip(REPORTED_ELSEWHERE.items(), ("--", "-.", ":"), strict=True):
            # images/s as the time of this batch
            ms = 1e3 * batch / rate
            axes.axvline(ms, color="gray", linestyle=style, label=f"{name}: as reported")
        axes.legend(fontsize="x-small", loc="lower right")
    axes.invert_yaxis()
    axes.set_xlabel("ms per step")


def main() -> int:
    """Exit code: 0, or 2 if a file of rows is damaged. The pictures stay as they are then."""
    try:
        on_gpu = [row for row in load_results() if row["device"] != "cpu"]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    devices = [newest_rows(runs) for _, runs in newest_runs(on_gpu)]
    # the documents show the GPU that most is known of
    devices.sort(key=len, reverse=True)
    for i, rows in enumerate(devices):
        # a run with other defaults has no rows
        if not rows:
            continue
        suffix = f"-{in_file_name(rows[0]['device'])}" if i else ""
        draw_operators(rows, IMAGES / f"operators{suffix}.png")
        draw_steps(rows, IMAGES / f"steps{suffix}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
