"""Write the generated tables of README.md from the rows in benchmarks/results:  python benchmarks/table.py"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from record import load_results
from registry import ENTRIES, ROOT, Shape, cases

README = ROOT / "README.md"
MISSING = "not measured yet"
# the headline's case and lines
MODEL, RESOLUTION = "SiT-XL/2", 256
LINES = {
    "plain": "this engine without alignment",
    "sra": "this engine",
    "sra_fp8": "this engine, fp8 teacher",
    "strong": "plain PyTorch at its best",
    "swap_ema": "the EMA as teacher in the student's place",
    "reference": "published code",
}
# may choose all of their settings
RIVALS = ("strong", "swap_ema")


def bytes_per_element(name: str) -> list[tuple[str, str]]:
    """Rows that an operator has in bf16, and the bytes per element of each, small terms left out."""
    entry = ENTRIES[name]
    labels = [f"{name}.forward", f"{name}.backward"] if entry.grads else [name]
    if entry.bytes is None:
        return [(label, "") for label in labels]
    shape = Shape("SiT-XL/2") if entry.per_model else Shape("SiT-XL/2", 256, 256)
    counts = entry.bytes(shape, (entry.dtype or torch.bfloat16).itemsize)
    return [
        (label, f"{round(n / entry.elements(shape))}")
        for label, n in zip(labels, counts, strict=True)
    ]


def _case(row: dict) -> tuple:
    return row["model"], row.get("resolution"), row.get("batch")


def _best_shape(rows: list[dict]) -> tuple | None:
    """The most valuable (model, resolution, batch) that the rows of one operator and pass have."""
    have = {_case(row) for row in rows}
    order = {
        (s.model, s.resolution, s.batch): i
        for i, (_, s) in enumerate(cases(None, None, None, None))
    }
    return min(
        have, key=lambda key: (order.get(key, len(order)), tuple(map(str, key))), default=None
    )


def cells(label: str, rows: list[dict]) -> list[str]:
    """Shape, percent of the ceiling, and speed relative to compiled and to plain PyTorch."""
    rows = [row for row in rows if row["name"] == label]
    best = _best_shape([row for row in rows if row["variant"] == "ours"])
    if best is None:
        return ["", MISSING, "", ""]
    found = {row["variant"]: row for row in rows if _case(row) == best}
    ours = found["ours"]
    model, resolution, batch = best
    shape = model if resolution is None else f"{model}, {resolution} px, {batch}"
    if "ms" not in ours:
        return [shape, "wrong", "", ""]
    speed = lambda rival: f"{found[rival]['ms'] / ours['ms']:.2f}x" if rival in found else ""
    against = [
        speed(v) if "ms" in found.get(v, {"ms": 0}) else "rival is wrong"
        for v in ("compile", "eager")
    ]
    return [shape, f"{ours['percent_of_ceiling']:.0f} %", *against]


def _line(words: list[str]) -> str:
    return "| " + " | ".join(words) + " |"


def _table(rows: list[dict]) -> list[str]:
    heads = ["operator", "bytes per element", "shape (model, pixels, images)", "of the ceiling"]
    lines = [_line([*heads, "against torch.compile", "against eager"]), "|---|---|---|---|---|---|"]
    for name in ENTRIES:
        for label, count in bytes_per_element(name):
            lines.append(_line([f"`{label}`", count, *cells(label, rows)]))
    return lines


def newest_groups(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    """The newest rows of every GPU, all of one commit, with a line that says which."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["device"], row["commit"]), []).append(row)
    newest = {}
    for key in sorted(groups, key=lambda key: min(row.get("date", "") for row in groups[key])):
        newest[key[0]] = key
    found = []
    for device, commit in sorted(newest.values()):
        group = groups[device, commit]
        versions = ", ".join(f"{name} {version}" for name, version in group[0]["versions"].items())
        copy = next(
            (f", copy {row['gbps']:.0f} GB/s" for row in group if row["name"] == "copy"), ""
        )
        found.append((f"{device}, {versions}, commit {commit}{copy}:", group))
    return found


def render_ops(rows: list[dict]) -> list[str]:
    """One table of operators for every GPU and commit."""
    lines = [
        "Operators in bf16, L2 cold, against the bytes (where none are given: the FLOPs) that they cannot do without; the ceiling",
        "is the copy (matmul) rate of the same run. A time is that of a call between others like it, what a launch costs included.",
        "Measured and written by `python benchmarks/run.py && python benchmarks/table.py`; [as a picture](docs/images/operators.png).",
    ]
    groups = newest_groups([row for row in rows if row["kind"] == "op" and row["device"] != "cpu"])
    for title, group in groups:
        # other dtypes are in the rows, not in the table
        shown = [
            row for row in group if row.get("dtype") == "bfloat16" or row["name"] == "noise_pair"
        ]
        lines += ["", title, "", *_table(shown)]
    return lines if groups else [*lines, "", *_table([])]


def _step_cells(row: dict, plain: dict | None) -> list[str]:
    percent = lambda name: f"{100 * row[name]:.1f} %" if name in row else ""
    memory = f"{row['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in row else ""
    over = f"{100 * (row['ms'] / plain['ms'] - 1):+.1f} %" if plain else ""
    return [
        f"{row['batch']}",
        f"{row['images_per_s']:.0f}",
        percent("mfu"),
        percent("mfu_with_teacher"),
        memory,
        over,
    ]


def _fastest(rows: list[dict], name: str) -> dict[int, dict]:
    """The variant's fastest row for every batch: a rival may choose all of its settings, this engine what it recomputes."""
    free = "+" if name in RIVALS else "+train.recompute="
    found: dict[int, dict] = {}
    for row in sorted(
        (row for row in rows if row["variant"].partition(free)[0] == name),
        key=lambda row: row["ms"],
    ):
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
    lines = [_line(heads), "|---" * len(heads) + "|"]
    for name, text in LINES.items():
        found, plain = _fastest(rows, name), _fastest(rows, "plain")
        for batch in sorted(found):
            label = f"`{found[batch]['variant']}`: {text}"
            lines.append(
                _line(
                    [
                        label,
                        *_step_cells(found[batch], plain.get(batch) if name != "plain" else None),
                    ]
                )
            )
        if not found:
            lines.append(_line([f"`{name}`: {text}", "", MISSING, "", "", "", ""]))
    return lines


def _option_table(rows: list[dict]) -> list[str]:
    """What settings of this engine cost or gain against ``sra`` at the same batch; none if none was measured."""
    usual = {row["batch"]: row for row in rows if row["variant"] == "sra"}
    options = [row for row in rows if row["variant"].startswith("sra+") and row["batch"] in usual]
    if not options:
        return []
    heads = ["setting", "images per GPU", "images/s", "memory", "time over `sra`"]
    lines = [
        "",
        "Settings of this engine, against `sra`:",
        "",
        _line(heads),
        "|---" * len(heads) + "|",
    ]
    for row in sorted(options, key=lambda row: (row["batch"], row["variant"])):
        batch, rate, _, _, memory, over = _step_cells(row, usual[row["batch"]])
        lines.append(_line([f"`{row['variant'].removeprefix('sra+')}`", batch, rate, memory, over]))
    return lines


def _headline_rows(rows: list[dict]) -> list[dict]:
    """Steps of the headline's case, on GPUs."""
    case = ("train_step", "step", MODEL, RESOLUTION)
    found = [
        row
        for row in rows
        if tuple(row.get(k) for k in ("kind", "name", "model", "resolution")) == case
    ]
    return [row for row in found if row["device"] != "cpu"]


def render_steps(rows: list[dict]) -> list[str]:
    """The headline: one table of training steps for every GPU and commit."""
    lines = [
        f"A training step of {MODEL} at {RESOLUTION} px on one GPU, all in one run. MFU counts three passes of the student; with",
        "teacher, the projection head and the truncated teacher too. `strong` at the largest of 256, 128, .. images that fits.",
        "Measured and written by `python benchmarks/gpu_suite.py second --reference PATH`, `cp runs/gpu_suite/rows.json",
        "benchmarks/results/GPU.json`, `python benchmarks/table.py` and, for the pictures, `python benchmarks/plot.py` (`PATH`: a",
        "checkout of the published code).",
    ]
    groups = newest_groups(_headline_rows(rows))
    for title, group in groups:
        lines += ["", title, "", *_step_table(group), *_option_table(group)]
    return lines if groups else [*lines, "", *_step_table([])]


def render_headline(rows: list[dict], batch: int = 32) -> list[str]:
    """One sentence for every GPU: milliseconds of a step with alignment, without it, and of the rivals."""
    lines = []
    for title, group in newest_groups(_headline_rows(rows)):
        ms = {
            name: found[batch]["ms"] for name in LINES if batch in (found := _fastest(group, name))
        }
        if not {"sra", "plain"} <= set(ms):
            continue
        rivals = {"strong": "plain PyTorch at its best", "reference": "the published code"}
        said = [
            f"{text} {ms[name]:.0f} ms ({ms[name] / ms['sra']:.1f} times as long)"
            for name, text in rivals.items()
            if name in ms
        ]
        lines.append(
            f"A step of {MODEL} at {RESOLUTION} px with {batch} images on one {title.partition(',')[0]} takes {ms['sra']:.0f} ms with SRA, "
            f"{ms['plain']:.0f} ms without"
            + "".join(f"; {each}" for each in said)
            + ": [measured](#measured)."
        )
    return lines


BLOCKS: dict[str, Callable[[list[dict]], list[str]]] = {
    "headline": render_headline,
    "step": render_steps,
    "ops": render_ops,
}


def fill(text: str, rows: list[dict]) -> str:
    """The text with what stands between the markers of every block replaced; ValueError if a marker is missing."""
    for name, render in BLOCKS.items():
        begin, end = f"<!-- {name} table begin -->", f"<!-- {name} table end -->"
        if begin not in text or end not in text:
            raise ValueError(f"expected the lines {begin} and {end} in the text")
        head, _, rest = text.partition(begin)
        text = "\n".join([head + begin, *render(rows), end + rest.partition(end)[2]])
    return text


def main(readme: Path = README) -> None:
    readme.write_text(fill(readme.read_text(), load_results()))


if __name__ == "__main__":
    sys.exit(main())
