"""Pictures of the rows, the operators against the copy bandwidth and the training step:  python benchmarks/plot.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(rows: list[dict], path: Path) -> None:
    """A bar for every operator: percent of the copy bandwidth that each variant reaches, at the most valuable shape."""
    rows = [
        row for row in rows if row["kind"] == "op" and "percent_of_ceiling" in row and "gbps" in row
    ]
    bars: dict[str, dict[str, float]] = {}
    for row in rows:
        # rows come most valuable first
        bars.setdefault(row["name"], {}).setdefault(row["variant"], row["percent_of_ceiling"])
    variants = list(dict.fromkeys(v for values in bars.values() for v in values))
    figure, axes = plt.subplots(figsize=(8, 0.5 + 0.18 * max(len(bars), 4) * max(len(variants), 1)))
    height = 0.8 / max(len(variants), 1)
    for i, variant in enumerate(variants):
        at = [k + i * height for k, values in enumerate(bars.values()) if variant in values]
        axes.barh(
            at,
            [values[variant] for values in bars.values() if variant in values],
            height,
            label=variant,
        )
    axes.set_yticks([k + 0.4 - height / 2 for k in range(len(bars))], list(bars))
    axes.invert_yaxis()
    axes.axvline(100, color="gray", linewidth=0.8)
    axes.set_xlabel("percent of the copy bandwidth" + (f", {rows[0]['device']}" if rows else ""))
    if variants:
        axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def draw_steps(rows: list[dict], path: Path) -> None:
    """Left milliseconds of every variant of the case with the most rungs of the ladder, beside what others report; right the time
    over plain against the teacher's share n/L, where the teacher's depth was varied."""
    from variants import LADDER, is_depth, teacher_share

    cases: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row["kind"] == "train_step" and row["name"] == "step":
            cases.setdefault((row["model"], row["resolution"], row["batch"]), {})[
                row["variant"]
            ] = row["ms"]
    title = lambda case: f"{case[0]} {case[1]} px, {case[2]} images"
    curves = {}
    for case, times in cases.items():
        points = sorted(
            (teacher_share(name, case[0]), ms) for name, ms in times.items() if is_depth(name)
        )
        if "plain" in times and len(points) > 1:
            curves[title(case)] = [(share, ms / times["plain"]) for share, ms in points]
    figure, axes = plt.subplots(
        1, 2 if curves else 1, figsize=(11 if curves else 7, 4), squeeze=False
    )
    highest = max(
        cases,
        key=lambda case: (len(set(LADDER) & set(cases[case])), len(cases[case])),
        default=None,
    )
    if highest:
        _bars(axes[0, 0], cases[highest], highest)
        axes[0, 0].set_title(title(highest))
    for label, points in curves.items():
        axes[0, 1].plot(*zip(*points, strict=True), marker="o", label=label)
        axes[0, 1].legend()
        axes[0, 1].set_xlabel("teacher's blocks over all blocks, n/L")
        axes[0, 1].set_ylabel("time over plain")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _bars(axes, times: dict[str, float], case: tuple) -> None:
    """The rungs of the ladder in its order, then the other variants, the slowest first."""
    from variants import LADDER
    from verdict import MODEL, PIXELS, PUBLISHED

    others = sorted((name for name in times if name not in LADDER), key=lambda name: -times[name])
    names = [name for name in LADDER if name in times] + others
    bars = axes.barh(names, [times[name] for name in names])
    axes.bar_label(bars, fmt="%.0f", padding=2, fontsize="x-small")
    if case[:2] == (MODEL, PIXELS):
        for (name, rate), style in zip(PUBLISHED.items(), ("--", "-.", ":"), strict=True):
            axes.axvline(
                1e3 * case[2] / rate, color="gray", linestyle=style, label=f"{name}: as reported"
            )
        axes.legend(fontsize="x-small", loc="lower right")
    axes.invert_yaxis()
    axes.set_xlabel("ms per step")


def main() -> None:
    """The pictures of README.md, from the newest rows of a GPU."""
    from record import ROOT, load_results
    from table import newest_groups

    for _, rows in newest_groups([row for row in load_results() if row["device"] != "cpu"]):
        draw(rows, ROOT / "docs" / "images" / "operators.png")
        draw_steps(rows, ROOT / "docs" / "images" / "steps.png")


if __name__ == "__main__":
    main()
