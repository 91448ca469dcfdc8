"""Write the generated parts of README.md and docs/benchmarks.md from the rows in benchmarks/results:
python -m benchmarks.report.table
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.operators.registry import OPERATORS, cases
from benchmarks.operators.shapes import Shape
from benchmarks.record import KEY, ROOT, load_results
from benchmarks.step.variants import ENGINE, PROGRAMS, PUBLISHED, Variant

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
    "strong": "ordinary PyTorch at its best",
    "swap_ema": "the EMA as teacher in the student's place",
    PUBLISHED: "published code",
}
HEADLINE_RIVALS = {
    "strong": "the same in ordinary PyTorch at its best",
    PUBLISHED: "the published code",
}

# runs whose `sra` is far from today's, and why: what a setting cost there says nothing now
OTHER_DEFAULTS = {"35f5e1f3ef": "the host launched every kernel, there was no graph of the step"}

# lines above the tables, as they stand in docs/benchmarks.md
STEP_TEXT = (
    f"A training step of {MODEL} at {RESOLUTION} px on one GPU, each line from the newest run that has it, "
    "compared within",
    "that run. MFU counts three passes of the student; with teacher, "
    "the projection head and the truncated teacher too.",
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
    "A time is that of a call between others like it, what a launch costs included. Each number",
    "is from the newest run that has it, both times of a ratio from one run.",
    "Measured and written by `python -m benchmarks.operators.run && python -m benchmarks.report.table`; "
    "[as a picture](images/operators.png).",
)
MODEL_TEXT = (
    "Other people's models, unmodified, with random weights: as they are, through `torch.compile`, "
    "and with",
    "[one line](use_the_ops.md) of ours. Device time; "
    "`N layers` are that many blocks of each kind.",
    "Measured by `python -m benchmarks.gpu_suite models --checkout PATH` or "
    "`python -m benchmarks.integrations --model NAME`.",
)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rule(columns: int) -> str:
    return "|---" * columns + "|"


def newest_runs(rows: list[dict]) -> list[tuple[str, list[list[dict]]]]:
    """The runs on every device, the newest first, with a title: device, versions, copy bandwidth.

    A run is the rows of one commit and its versions. Only runs with the versions of the newest one
    are kept.
    """
    runs: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        versions = json.dumps(row["versions"], sort_keys=True)
        runs.setdefault((row["device"], row["commit"], versions), []).append(row)
    # a run is as old as its first row
    age = lambda run: min(row.get("date", "") for row in run)
    found = []
    for device in sorted({device for device, _, _ in runs}):
        own = [run for (where, _, _), run in runs.items() if where == device]
        own.sort(key=age, reverse=True)
        versions = own[0][0]["versions"]
        own = [run for run in own if run[0]["versions"] == versions]
        words = ", ".join(f"{name} {version}" for name, version in versions.items())
        # a family of kernels is called "copy" too, and has no bandwidth
        copies = [
            row["gbps"] for run in own for row in run if row["name"] == "copy" and "gbps" in row
        ]
        copy = f", copy {copies[0]:.0f} GB/s" if copies else ""
        found.append((f"{device}, {words}{copy}:", own))
    return found


def newest_rows(runs: list[list[dict]]) -> list[dict]:
    """The newest of every measurement, those of the newest run first; none of a run with other defaults."""
    found: dict[tuple, dict] = {}
    for run in runs:
        if run[0]["commit"] in OTHER_DEFAULTS:
            continue
        for row in run:
            found.setdefault(tuple(row.get(name) for name in KEY if name != "commit"), row)
    return list(found.values())


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


def case_of(row: dict) -> tuple:
    return row["model"], row.get("resolution"), row.get("batch")


def most_valuable_case(rows: list[dict]) -> tuple | None:
    """The case of ``rows`` that comes first in the order of a run; None without rows."""
    order = {}
    for i, (_, shape) in enumerate(cases()):
        order[shape.model, shape.resolution, shape.batch] = i
    rank = lambda case: (order.get(case, len(order)), tuple(map(str, case)))
    return min({case_of(row) for row in rows}, key=rank, default=None)


def operator_cells(label: str, runs: list[list[dict]]) -> list[str]:
    """Shape, percentage of the ceiling, speed relative to compiled and to eager PyTorch.

    Args:
        label: name of the operator's rows.
        runs: on one device, the newest first.
    """
    named = [[row for row in run if row["name"] == label] for run in runs]
    best = None
    for run in named:
        best = best or most_valuable_case([row for row in run if row["variant"] == "ours"])
    if best is None:
        return ["", MISSING, "", ""]
    model, resolution, batch = best
    shape = model if resolution is None else f"{model}, {resolution} px, {batch}"
    by_variant = [{row["variant"]: row for row in run if case_of(row) == best} for run in named]
    # a row without a time was wrong or failed
    ours = next(run["ours"] for run in by_variant if "ours" in run)
    if "ms" not in ours:
        return [shape, "wrong", "", ""]

    def speed(rival: str) -> str:
        both = next((run for run in by_variant if {rival, "ours"} <= set(run)), None)
        if both is None or "ms" not in both["ours"]:
            return ""
        if "ms" not in both[rival]:
            return "rival is wrong"
        return f"{both[rival]['ms'] / both['ours']['ms']:.2f}x"

    return [shape, f"{ours['percent_of_ceiling']:.0f} %", speed("compile"), speed("eager")]


def _operator_table(runs: list[list[dict]]) -> list[str]:
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
            lines.append(_line([f"`{label}`", count, *operator_cells(label, runs)]))
    return lines


def in_table_dtype(row: dict) -> bool:
    """Whether a row is in bf16, or in the only dtype of its operator; other dtypes are not in the table."""
    operator = OPERATORS.get(row["name"].partition(".")[0])
    only_dtype = operator is not None and operator.dtype is not None
    return row.get("dtype") == "bfloat16" or only_dtype


def _for_every_gpu(
    text: Sequence[str], rows: list[dict], table: Callable[[list[list[dict]]], list[str]]
) -> list[str]:
    """The text, and the table of every GPU's runs; without rows the empty one."""
    devices = newest_runs(rows)
    if not devices:
        return [*text, "", *table([])]
    lines = list(text)
    for title, runs in devices:
        lines += ["", title, "", *table(runs)]
    return lines


def render_operators(rows: list[dict]) -> list[str]:
    """A table of operators for every GPU."""
    on_gpu = [row for row in rows if row["kind"] == "op" and row["device"] != "cpu"]
    shown = lambda runs: [[row for row in run if in_table_dtype(row)] for run in runs]
    return _for_every_gpu(OPERATOR_TEXT, on_gpu, lambda runs: _operator_table(shown(runs)))


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


def chooses_freely(name: str, wanted: str) -> bool:
    """Whether a variant is the wanted one with settings that it may choose for itself.

    A rival may choose its switches, and this engine what it recomputes. Other options change what is
    trained. The published code has no settings.
    """
    base = name.partition("+")[0]
    if base != wanted:
        return False
    if base not in PROGRAMS and base not in ENGINE:
        return name == base
    try:
        variant = Variant.parse(name)
    except ValueError:
        # a row with a setting that there is no more
        return False
    chosen = {option for option, _ in variant.options.items() - ENGINE.get(base, {}).items()}
    return chosen <= {"train.recompute"} and not variant.variables


def _fastest(rows: list[dict], name: str) -> dict[int, dict]:
    """``{batch: the fastest row of the variant}`` over the settings that it may choose."""
    own = [row for row in rows if chooses_freely(row["variant"], name)]
    found: dict[int, dict] = {}
    for row in sorted(own, key=lambda row: row["ms"]):
        found.setdefault(row["batch"], row)
    return found


def _newest_fastest(runs: list[list[dict]], name: str) -> dict[int, tuple[dict, dict | None]]:
    """``{batch: (row, plain)}``: the fastest row in the newest run that has the variant, and ``plain`` there."""
    found: dict[int, tuple[dict, dict | None]] = {}
    for run in runs:
        plain = _fastest(run, "plain")
        for batch, row in _fastest(run, name).items():
            found.setdefault(batch, (row, plain.get(batch)))
    return found


def _step_table(runs: list[list[dict]]) -> list[str]:
    heads = [
        "",
        "images per GPU",
        "images/s",
        "MFU",
        "MFU with teacher",
        "memory",
        "time over plain",
        "commit",
    ]
    lines = [_line(heads), _rule(len(heads))]
    for name, text in LINES.items():
        found = _newest_fastest(runs, name)
        for batch in sorted(found):
            row, plain = found[batch]
            label = f"`{row['variant']}`: {text}"
            cells = _step_cells(row, plain if name != "plain" else None)
            lines.append(_line([label, *cells, row["commit"]]))
        # a variant without rows keeps its line, so that its absence shows
        if not found:
            lines.append(_line([f"`{name}`: {text}", "", MISSING, "", "", "", "", ""]))
    return lines


def _option_table(runs: list[list[dict]]) -> list[str]:
    """What settings of this engine cost or gain against ``sra`` at the same batch; empty if none was measured.

    Of a setting the newest run counts: an older one may have had another default.
    """
    found: dict[str, list[tuple[dict, dict]]] = {}
    for run in runs:
        if run[0]["commit"] in OTHER_DEFAULTS:
            continue
        default = {row["batch"]: row for row in run if row["variant"] == "sra"}
        own: dict[str, list[tuple[dict, dict]]] = {}
        for row in run:
            if row["variant"].startswith("sra+") and row["batch"] in default:
                setting = row["variant"].removeprefix("sra+").partition("=")[0]
                own.setdefault(setting, []).append((row, default[row["batch"]]))
        for setting, pairs in own.items():
            found.setdefault(setting, pairs)
    if not found:
        return []
    heads = ["setting", "images per GPU", "images/s", "memory", "time over `sra`", "commit"]
    lines = ["", "Settings of this engine, against `sra`:", "", _line(heads), _rule(len(heads))]
    pairs = [pair for own in found.values() for pair in own]
    for row, default in sorted(pairs, key=lambda pair: (pair[0]["batch"], pair[0]["variant"])):
        batch, rate, _, _, memory, over = _step_cells(row, default)
        setting = row["variant"].removeprefix("sra+")
        lines.append(_line([f"`{setting}`", batch, rate, memory, over, row["commit"]]))
    return lines


def render_steps(rows: list[dict]) -> list[str]:
    """A table of training steps for every GPU, and one of this engine's settings."""
    tables = lambda runs: [*_step_table(runs), *_option_table(runs)]
    return _for_every_gpu(STEP_TEXT, _headline_rows(rows), tables)


def render_headline(rows: list[dict]) -> list[str]:
    """A sentence for every GPU: milliseconds of a step with alignment, without it, and of the rivals."""
    lines = []
    for title, runs in newest_runs(_headline_rows(rows)):
        found = {name: _newest_fastest(runs, name).get(HEADLINE_BATCH) for name in LINES}
        # without alignment: in the same run
        sra, plain = found["sra"] or (None, None)
        if sra is None or plain is None:
            continue
        device = title.partition(",")[0]
        sentence = (
            f"A step of {MODEL} at {RESOLUTION} px with {HEADLINE_BATCH} images on one {device} "
            f"takes {sra['ms']:.0f} ms with SRA, {plain['ms']:.0f} ms without"
        )
        for name, text in HEADLINE_RIVALS.items():
            rival = found[name]
            if rival is not None:
                ms = rival[0]["ms"]
                sentence += f"; {text} {ms:.0f} ms ({ms / sra['ms']:.1f} times as long)"
        lines.append(f"{sentence}: [measured](#measured).")
    return lines


# the table of other people's models


def _model_cells(own: dict[str, dict]) -> list[str]:
    """Milliseconds of the three programs, how much faster ours is than the compiler's, and memory.

    A program that was wrong or could not run has no time.
    """
    ms = {variant: row.get("ms") for variant, row in own.items()}
    cells = []
    for variant in ("eager", "compile", "ours"):
        if variant not in own:
            cells.append("")
        else:
            cells.append("failed" if ms[variant] is None else f"{ms[variant]:.2f}")
    faster = ""
    if ms.get("compile") and ms.get("ours"):
        faster = f"{ms['compile'] / ms['ours']:.2f}x"
    for variant in ("compile", "ours"):
        peak = own.get(variant, {}).get("peak_bytes")
        cells.append("" if peak is None else f"{peak / 2**30:.2f} GiB")
    return [*cells[:3], faster, *cells[3:]]


def _model_table(runs: list[list[dict]]) -> list[str]:
    heads = [
        "model",
        "pixels",
        "batch",
        "pass",
        "eager, ms",
        "torch.compile, ms",
        "with the line, ms",
        "against torch.compile",
        "memory of torch.compile",
        "memory with the line",
        "commit",
    ]
    lines = [_line(heads), _rule(len(heads))]
    found: dict[tuple, dict[str, dict]] = {}
    for run in runs:
        own: dict[tuple, dict[str, dict]] = {}
        for row in run:
            key = (row["model"], row["dtype"], row["resolution"], row["batch"], row["name"])
            own.setdefault(key, {})[row["variant"]] = row
        # all programs of a line from one run
        for key, variants in own.items():
            if "ours" in variants:
                found.setdefault(key, variants)
    passes = {"forward": "forward", "both": "forward and backward"}
    for (model, dtype, resolution, batch, name), variants in sorted(found.items()):
        case = [f"{model}, {dtype}", f"{resolution}", f"{batch}", passes[name]]
        cells = [*case, *_model_cells(variants)]
        lines.append(_line([*cells, variants["ours"]["commit"]]))
    if not found:
        lines.append(_line([MISSING, *[""] * (len(heads) - 1)]))
    return lines


def render_models(rows: list[dict]) -> list[str]:
    """A table of other people's models for every GPU."""
    wanted = [row for row in rows if row["kind"] == "model" and row["device"] != "cpu"]
    return _for_every_gpu(MODEL_TEXT, wanted, _model_table)


# documents

Blocks = dict[str, Callable[[list[dict]], list[str]]]
# which blocks a document has
DOCUMENTS: dict[Path, Blocks] = {
    ROOT / "README.md": {"headline": render_headline},
    ROOT / "docs" / "benchmarks.md": {
        "step": render_steps,
        "ops": render_operators,
        "model": render_models,
    },
}


def fill(text: str, blocks: Blocks, rows: list[dict]) -> str:
    """The text with everything between the markers of each block replaced.

    Raises:
        ValueError: a marker is missing.
    """
    for name, render in blocks.items():
        begin = f"<!-- {name} table begin -->"
        end = f"<!-- {name} table end -->"
        if begin not in text or end not in text:
            raise ValueError(f"expected the lines {begin} and {end} in the text, got none")
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = "\n".join([head + begin, *render(rows), end + tail])
    return text


def main() -> int:
    """Exit code: 0, or 2 if a file of rows is damaged. The documents stay as they are then."""
    try:
        rows = load_results()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for path, blocks in DOCUMENTS.items():
        path.write_text(fill(path.read_text(), blocks, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
