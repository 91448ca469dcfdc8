"""Write the table of costs in docs/alignments.md, counted without a GPU:
python -m benchmarks.cost_model.alignment_costs
"""

import sys
from fractions import Fraction

from benchmarks.record import ROOT
from benchmarks.report.table import fill
from benchmarks.step.variants import OTHER_TARGETS, Variant
from sra_fast.config.schema import Config
from sra_fast.training.flops import forward_flops, training_flops

DOCUMENT = ROOT / "docs" / "alignments.md"
BLOCK = "cost"
MODELS = ("SiT-XL/2", "SiT-B/2")
RESOLUTION = 256
# targets by the variant of the step that has them
TARGETS = {"none": "plain", "ema_teacher": "sra", **{name: name for name in OTHER_TARGETS}}
PER_TOKEN = "plain, with a modulation per token"


def configuration(target: str, model: str) -> Config:
    """With the layers of the configs, and SRA's for every target with a teacher."""
    return Variant.parse(TARGETS[target]).configuration(model, RESOLUTION, 1, "cpu")


def step_cost(target: str, model: str) -> float:
    """FLOPs per image of a training step, three for each of a forward."""
    return training_flops(configuration(target, model))[1]


def per_token_cost(model: str) -> Fraction:
    """FLOPs per image of the plain step if every token had a modulation of its own, as in published
    codes with more than one time per image.
    """
    cfg = configuration("none", model)
    part = forward_flops(cfg)
    return 3 * (part["student"] + (cfg.model.num_tokens - 1) * part["modulation"])


def render(rows: list[dict]) -> list[str]:
    """A table of all targets. ``rows`` of measurements are not read."""
    heads = ["`align.target`"]
    for model in MODELS:
        heads += [f"{model}, GFLOP per image", "over plain"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for target in (*TARGETS, PER_TOKEN):
        cells = [f"`{target}`" if target in TARGETS else target]
        for model in MODELS:
            plain = step_cost("none", model)
            cost = step_cost(target, model) if target in TARGETS else float(per_token_cost(model))
            over = "" if target == "none" else f"{100 * (cost / plain - 1):+.1f} %"
            cells += [f"{cost / 1e9:.1f}", over]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    DOCUMENT.write_text(fill(DOCUMENT.read_text(), {BLOCK: render}, []))


if __name__ == "__main__":
    sys.exit(main())
