"""A bar for every operator: percent of the copy bandwidth that each variant reaches, at the most valuable shape."""
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def draw(rows: list[dict], path: Path) -> None:
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
