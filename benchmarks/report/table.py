"""Write the generated parts of README.md from the rows in benchmarks/results: python -m benchmarks.report.table"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.operators.registry import OPERATORS, cases
from benchmarks.operators.shapes import Shape
from benchmarks.record import ROOT, load_results
from benchmarks.step.variants import PUBLISHED

README = ROOT / "README.md"
MISSING = "not measured yet"

# the case of the headline and of the table of steps
MODEL = "SiT-XL/2"
RESOLUTION = 256
HEADLINE_BATCH = 32
# variants in the table of steps
LINES = {
    "plain": "this engine without alignment",
    "sra": "this engine",
    "sra_fp8": "this engine, fp8 teacher",
    "strong": "plain PyTorch at its best",
    "swap_ema": "the EMA as teacher in the student's place",
    PUBLISHED: "published code",
}
# rivals may choose all of their settings, this engine only what it recomputes
RIVALS = ("strong", "swap_ema")
HEADLINE_RIVALS = {"strong": "plain PyTorch at its best", PUBLISHED: "the published code"}

# lines above the tables, as they stand in README.md
STEP_TEXT = (
    f"A training step of {MODEL} at {RESOLUTION} px on one GPU, all in one run. "
    "MFU counts three passes of the student; with",
    "teacher, the projection head and the truncated teacher too. "
    "`strong` at the largest of 256, 128, .. images that fits.",
    "Measured and written by `python -m benchmarks.gpu_suite second --published PATH`, "
    "`cp runs/gpu_suite/rows.json",
    "benchmarks/results/GPU.json`, `python -m benchmarks.report.table` and, for the pictures, "
    "`python -m benchmarks.report.plot` (`PATH`: a",
    "checkout of the published code).",
)
OPERATOR_TEXT = (
    "Operators in bf16, L2 cold, against the bytes (where none are given: the FLOPs) "
    "that they cannot do without; the ceiling",
    "is the copy (matmul) rate of the same run. "
    "A time is that of a call between others like it, what a launch costs included.",
    "Measured and written by `python -m benchmarks.operators.run && python -m benchmarks.report.table`; "
    "[as a picture](docs/images/operators.png).",
)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rule(columns: int) -> str:
    return "|---" * columns + "|"


def newest_groups(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    """The rows of the newest commit of every device, with a title: device, versions, commit, copy bandwidth."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["device"], row["commit"]), []).append(row)
    # a group is as old as its first row
    age = lambda key: min(row.get("date", "") for row in groups[key])
    newest = {}
    for device, commit in sorted(groups, key=age):
        newest[device] = commit
    found = []
    for device, commit in sorted(newest.items()):
        group = groups[device, commit]
        versions = ", ".join(f"{name} {version}" for name, version in group[0]["versions"].items())
        # a family of kernels is called "copy" too, and has no bandwidth
        copies = [row["gbps"] for row in group if row["name"] == "copy" and "gbps" in row]
        copy = f", copy {copies[0]:.0f} GB/s" if copies else ""
        found.append((f"{device}, {versions}, commit {commit}{copy}:", group))
    return found


# the table of operators


def bytes_per_element(name: str) -> list[tuple[str, str]]:
    """Rows that an operator has in the table, and the bytes per element of each in bf16, without small terms.

    The bytes are empty for operators that are bound by arithmetic.
    """
    operator = OPERATORS[name]
    labels = [f"{name}.forward", f"{name}.backward"] if operator.grads else [name]
    if operator.bytes is None:
        return [(label, "") for label in labels]
    shape = Shape(MODEL) if operator.per_model else Shape(MODEL, RESOLUTION, 256)
    dtype = operator.dtype or torch.bfloat16
    counts = operator.bytes(shape, dtype.itemsize)
    elements = operator.elements(shape)
    # without a backward pass there is a label only for the forward pass
    return [
        (label, f"{round(count / elements)}")
        for label, count in zip(labels, counts[: len(labels)], strict=True)
    ]


def _case(row: dict) -> tuple:
    return row["model"], row.get("resolution"), row.get("batch")


def _most_valuable_case(rows: list[dict]) -> tuple | None:
    """The case of ``rows`` that comes first in the order of a run; None without rows."""
    order = {}
    for i, (_, shape) in enumerate(cases()):
        order[shape.model, shape.resolution, shape.batch] = i
    rank = lambda case: (order.get(case, len(order)), tuple(map(str, case)))
    return min({_case(row) for row in rows}, key=rank, default=None)


def operator_cells(label: str, rows: list[dict]) -> list[str]:
    """Shape, percentage of the ceiling, speed relative to compiled and to eager PyTorch.

    Args:
        label: name of the operator's rows.
        rows: of one device and commit.
    """
    rows = [row for row in rows if row["name"] == label]
    best = _most_valuable_case([row for row in rows if row["variant"] == "ours"])
    if best is None:
        return ["", MISSING, "", ""]
    model, resolution, batch = best
    shape = model if resolution is None else f"{model}, {resolution} px, {batch}"
    by_variant = {row["variant"]: row for row in rows if _case(row) == best}
    # a row without a time was wrong
    ours = by_variant["ours"]
    if "ms" not in ours:
        return [shape, "wrong", "", ""]

    def speed(rival: str) -> str:
        if rival not in by_variant:
            return ""
        if "ms" not in by_variant[rival]:
            return "rival is wrong"
        return f"{by_variant[rival]['ms'] / ours['ms']:.2f}x"

    return [shape, f"{ours['percent_of_ceiling']:.0f} %", speed("compile"), speed("eager")]


def _operator_table(rows: list[dict]) -> list[str]:
    heads = [
        "operator",
        "bytes per element",
        "shape (model, pixels, images)",
        "of the ceiling",
        "against torch.compile",
        "against eager",
    ]
    lines = [_line(heads), _rule(len(heads))]
    for name in OPERATORS:
        for label, count in bytes_per_element(name):
            lines.append(_line([f"`{label}`", count, *operator_cells(label, rows)]))
    return lines


def _in_table_dtype(row: dict) -> bool:
    """Whether a row is in bf16, or in the only dtype of its operator; other dtypes are not in the table."""
    operator = OPERATORS.get(row["name"].partition(".")[0])
    only_dtype = operator is not None and operator.dtype is not None
    return row.get("dtype") == "bfloat16" or only_dtype


def render_operators(rows: list[dict]) -> list[str]:
    """A table of operators for every GPU."""
    lines = list(OPERATOR_TEXT)
    on_gpu = [row for row in rows if row["kind"] == "op" and row["device"] != "cpu"]
    groups = newest_groups(on_gpu)
    if not groups:
        return [*lines, "", *_operator_table([])]
    for title, group in groups:
        shown = [row for row in group if _in_table_dtype(row)]
        lines += ["", title, "", *_operator_table(shown)]
    return lines


# the tables of steps


def _headline_rows(rows: list[dict]) -> list[dict]:
    """Steps of the headline's model and resolution on GPUs."""
    wanted = {"kind": "train_step", "name": "step", "model": MODEL, "resolution": RESOLUTION}
    return [
        row
        for row in rows
        if row["device"] != "cpu" and all(row.get(k) == v for k, v in wanted.items())
    ]


def _step_cells(row: dict, compared_with: dict | None) -> list[str]:
    """Batch, images/s, MFU, MFU with teacher, memory, time over that of another row."""
    percent = lambda name: f"{100 * row[name]:.1f} %" if name in row else ""
    memory = f"{row['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in row else ""
    over = ""
    if compared_with:
        over = f"{100 * (row['ms'] / compared_with['ms'] - 1):+.1f} %"
    return [
        f"{row['batch']}",
        f"{row['images_per_s']:.0f}",
        percent("mfu"),
        percent("mfu_with_teacher"),
        memory,
        over,
    ]


def _fastest(rows: list[dict], name: str) -> dict[int, dict]:
    """``{batch: the fastest row of the variant}`` over the settings that it may choose."""
    free = "+" if name in RIVALS else "+train.recompute="
    own = [row for row in rows if row["variant"].partition(free)[0] == name]
    found: dict[int, dict] = {}
    for row in sorted(own, key=lambda row: row["ms"]):
        found.setdefault(row["batch"], row)
    return found


def _step_table(rows: list[dict]) -> list[str]:
    heads = [
        "",
        "images per GPU",
        "images/s",
        "MFU",
        "MFU with teacher",
        "memory",
        "time over plain",
    ]
    lines = [_line(heads), _rule(len(heads))]
    # compared with at the same batch
    plain = _fastest(rows, "plain")
    for name, text in LINES.items():
        found = _fastest(rows, name)
        for batch in sorted(found):
            row = found[batch]
            compared_with = plain.get(batch) if name != "plain" else None
            label = f"`{row['variant']}`: {text}"
            lines.append(_line([label, *_step_cells(row, compared_with)]))
        # a variant without rows keeps its line, so that its absence shows
        if not found:
            lines.append(_line([f"`{name}`: {text}", "", MISSING, "", "", "", ""]))
    return lines


def _option_table(rows: list[dict]) -> list[str]:
    """What settings of this engine cost or gain against ``sra`` at the same batch; empty if none was measured."""
    default = {row["batch"]: row for row in rows if row["variant"] == "sra"}
    options = [row for row in rows if row["variant"].startswith("sra+") and row["batch"] in default]
    if not options:
        return []
    heads = ["setting", "images per GPU", "images/s", "memory", "time over `sra`"]
    lines = ["", "Settings of this engine, against `sra`:", "", _line(heads), _rule(len(heads))]
    for row in sorted(options, key=lambda row: (row["batch"], row["variant"])):
        batch, rate, _, _, memory, over = _step_cells(row, default[row["batch"]])
        setting = row["variant"].removeprefix("sra+")
        lines.append(_line([f"`{setting}`", batch, rate, memory, over]))
    return lines


def render_steps(rows: list[dict]) -> list[str]:
    """A table of training steps for every GPU, and one of this engine's settings."""
    lines = list(STEP_TEXT)
    groups = newest_groups(_headline_rows(rows))
    if not groups:
        return [*lines, "", *_step_table([])]
    for title, group in groups:
        lines += ["", title, "", *_step_table(group), *_option_table(group)]
    return lines


def render_headline(rows: list[dict]) -> list[str]:
    """A sentence for every GPU: milliseconds of a step with alignment, without it, and of the rivals."""
    lines = []
    for title, group in newest_groups(_headline_rows(rows)):
        ms = {}
        for name in LINES:
            fastest = _fastest(group, name)
            if HEADLINE_BATCH in fastest:
                ms[name] = fastest[HEADLINE_BATCH]["ms"]
        # without these two there is nothing to say
        if "sra" not in ms or "plain" not in ms:
            continue
        device = title.partition(",")[0]
        sentence = (
            f"A step of {MODEL} at {RESOLUTION} px with {HEADLINE_BATCH} images on one {device} "
            f"takes {ms['sra']:.0f} ms with SRA, {ms['plain']:.0f} ms without"
        )
        for name, text in HEADLINE_RIVALS.items():
            if name in ms:
                ratio = ms[name] / ms["sra"]
                sentence += f"; {text} {ms[name]:.0f} ms ({ratio:.1f} times as long)"
        lines.append(f"{sentence}: [measured](#measured).")
    return lines


# README.md


BLOCKS: dict[str, Callable[[list[dict]], list[str]]] = {
    "headline": render_headline,
    "step": render_steps,
    "ops": render_operators,
}


def fill(text: str, rows: list[dict]) -> str:
    """The text with everything between the markers of a block replaced.

    Raises:
        ValueError: a marker is missing.
    """
    for name, render in BLOCKS.items():
        begin = f"<!-- {name} table begin -->"
        end = f"<!-- {name} table end -->"
        if begin not in text or end not in text:
            raise ValueError(f"expected the lines {begin} and {end} in the text, got none")
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = "\n".join([head + begin, *render(rows), end + tail])
    return text


def main(readme: Path = README) -> None:
    readme.write_text(fill(readme.read_text(), load_results()))


if __name__ == "__main__":
    sys.exit(main())
