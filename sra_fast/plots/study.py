"""The picture of a study: differences from its baseline, seed by seed, with intervals."""

from dataclasses import dataclass
from pathlib import Path

from sra_fast.plots.report import pyplot, save_figure

# panels in a line: with more, the names of the variants are far from their dots
COLUMNS = 3
# inches
PANEL_WIDTH = 3.6
ROW_HEIGHT = 0.3
# a name that is longer is cut
LONGEST = 44


@dataclass(frozen=True)
class StudyPanel:
    """The differences of one score.

    Attributes:
        title: of the axis.
        differences: variant -> what its score is above the baseline's, for each seed.
        intervals: variant -> interval of the mean of these, or None.
        rounding: the largest difference that rounding alone makes, or None.
    """

    title: str
    differences: dict[str, list[float]]
    intervals: dict[str, tuple[float, float] | None]
    rounding: float | None = None


def plot_study(path: Path, panels: list[StudyPanel]) -> None:
    """A panel per score; in it a dot per seed, and the interval and mean of every variant.

    What rounding alone does is a grey band around 0.

    Args:
        path: the PNG to write.
        panels: with the same variants, from the top; without any there is no picture.
    """
    plt = pyplot(path) if panels else None
    if plt is None:
        return
    variants = list(dict.fromkeys(name for panel in panels for name in panel.differences))
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    names = [_short(name) for name in variants]
    # about 12 letters to an inch
    width = PANEL_WIDTH * columns + max(map(len, names), default=0) / 12
    height = lines * (ROW_HEIGHT * len(variants) + 0.9)
    figure, axes = plt.subplots(
        lines, columns, figsize=(width, height), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw(axis, panel, variants)
    # the last line may not be full
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    # the first variant at the top, with room above and below
    axes[0, 0].set_yticks(range(len(variants)), names)
    axes[0, 0].set_ylim(len(variants) - 0.4, -0.6)
    save_figure(plt, figure, path)


def _draw(axis, panel: StudyPanel, variants: list[str]) -> None:
    axis.axvline(0, color="black", linewidth=0.8)
    if panel.rounding:
        axis.axvspan(-panel.rounding, panel.rounding, color="0.85", linewidth=0)
    for row, variant in enumerate(variants):
        values = panel.differences.get(variant, [])
        if not values:
            continue
        interval = panel.intervals[variant]
        if interval is not None:
            axis.plot(interval, [row, row], color="tab:blue", linewidth=2.5, alpha=0.5)
        # the dots lie apart from the bar
        axis.plot(values, [row + 0.22] * len(values), "o", color="tab:blue", markersize=3)
        axis.plot([sum(values) / len(values)], [row], "|", color="black", markersize=9)
    axis.set_xlabel(panel.title)
    axis.locator_params(axis="x", nbins=5)
    axis.grid(axis="x", linewidth=0.4)
    axis.tick_params(axis="both", labelsize="small")


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
