"""Pictures of the rows: the operators against the copy bandwidth, and the training step."""
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def draw(rows: list[dict], path: Path) -> None:
    """A bar for every operator: percent of the copy bandwidth that each variant reaches, at the most valuable shape."""
    rows = [row for row in rows if row["kind"] == "op" and "percent_of_ceiling" in row and "gbps" in row]
    bars: dict[str, dict[str, float]] = {}
    for row in rows:
        # rows come most valuable first
        bars.setdefault(row["name"], {}).setdefault(row["variant"], row["percent_of_ceiling"])
    variants = list(dict.fromkeys(v for values in bars.values() for v in values))
    figure, axes = plt.subplots(figsize=(8, 0.5 + 0.18 * max(len(bars), 4) * max(len(variants), 1)))
    height = 0.8 / max(len(variants), 1)
    for i, variant in enumerate(variants):
        at = [k + i * height for k, values in enumerate(bars.values()) if variant in values]
        axes.barh(at, [values[variant] for values in bars.values() if variant in values], height, label=variant)
    axes.set_yticks([k + 0.4 - height / 2 for k in range(len(bars))], list(bars))
    axes.invert_yaxis()
    axes.axvline(100, color="gray", linewidth=0.8)
    axes.set_xlabel("percent of the copy bandwidth" + (f", {rows[0]['device']}" if rows else ""))
    if variants:
        axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def draw_steps(rows: list[dict], path: Path) -> None:
    """Left the ladder, a bar of milliseconds for every rung, beside what others report; right the time over plain against the teacher's share n/L."""
    from variants import LADDER, is_depth, teacher_share
    from verdict import MODEL, PIXELS, PUBLISHED

    cases: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row["kind"] == "train_step" and row["name"] == "step":
            cases.setdefault((row["model"], row["resolution"], row["batch"]), {})[row["variant"]] = row["ms"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    title = lambda case: f"{case[0]} {case[1]} px, {case[2]} images"
    highest = max(cases, key=lambda case: len(set(LADDER) & set(cases[case])), default=None)
    rungs = [name for name in LADDER if name in cases.get(highest, ())]
    if rungs:
        left.barh(rungs, [cases[highest][name] for name in rungs])
        left.set_title(title(highest))
        if highest[:2] == (MODEL, PIXELS):
            for (name, rate), style in zip(PUBLISHED.items(), ("--", "-.", ":")):
                left.axvline(1e3 * highest[2] / rate, color="gray", linestyle=style, label=f"{name}: as reported")
            left.legend(fontsize="x-small")
    left.invert_yaxis()
    left.set_xlabel("ms per step")
    for case, times in cases.items():
        points = sorted((teacher_share(name, case[0]), ms / times["plain"]) for name, ms in times.items()
                        if "plain" in times and is_depth(name))
        if points:
            right.plot(*zip(*points), marker="o", label=title(case))
            right.legend()
    right.set_xlabel("teacher's blocks over all blocks, n/L")
    right.set_ylabel("time over plain")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
