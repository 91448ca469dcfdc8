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
    "reference": "published code",
}


def bytes_per_element(name: str) -> list[tuple[str, str]]:
    """Rows that an operator has in bf16, and the bytes per element of each, small terms left out."""
    entry = ENTRIES[name]
    labels = [f"{name}.forward", f"{name}.backward"] if entry.grads else [name]
    if entry.bytes is None:
        return [(label, "") for label in labels]
    shape = Shape("SiT-XL/2") if entry.per_model else Shape("SiT-XL/2", 256, 256)
    counts = entry.bytes(shape, (entry.dtype or torch.bfloat16).itemsize)
    return [(label, f"{round(n / entry.elements(shape))}") for label, n in zip(labels, counts)]


def _case(row: dict) -> tuple:
    return row["model"], row.get("resolution"), row.get("batch")


def _best_shape(rows: list[dict]) -> tuple | None:
    """The most valuable (model, resolution, batch) that the rows of one operator and pass have."""
    have = {_case(row) for row in rows}
    order = {(s.model, s.resolution, s.batch): i for i, (_, s) in enumerate(cases(None, None, None, None))}
    return min(have, key=lambda key: (order.get(key, len(order)), tuple(map(str, key))), default=None)


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
    against = [speed(v) if "ms" in found.get(v, {"ms": 0}) else "rival is wrong" for v in ("compile", "eager")]
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


def _groups(rows: list[dict]) -> list[tuple[str, list[dict]]]:
    """Rows by GPU and commit, each with a line that says which."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["device"], row["commit"]), []).append(row)
    found = []
    for (device, commit), group in sorted(groups.items()):
        versions = ", ".join(f"{name} {version}" for name, version in group[0]["versions"].items())
        copy = next((f", copy {row['gbps']:.0f} GB/s" for row in group if row["name"] == "copy"), "")
        found.append((f"{device}, {versions}, commit {commit}{copy}:", group))
    return found


def render_ops(rows: list[dict]) -> list[str]:
    """One table of operators for every GPU and commit."""
    lines = [
        "Operators in bf16, L2 cold, against the bytes (where none are given: the FLOPs) that they cannot do without; the ceiling",
        "is the copy (matmul) rate of the same run. Measured and written by",
        "`python benchmarks/run.py && python benchmarks/table.py`.",
    ]
    groups = _groups([row for row in rows if row["kind"] == "op" and row["device"] != "cpu"])
    for title, group in groups:
        # other dtypes are in the rows, not in the table
        shown = [row for row in group if row.get("dtype") == "bfloat16" or row["name"] == "noise_pair"]
        lines += ["", title, "", *_table(shown)]
    return lines if groups else [*lines, "", *_table([])]


def _step_cells(row: dict, plain: dict | None) -> list[str]:
    percent = lambda name: f"{100 * row[name]:.1f} %" if name in row else ""
    memory = f"{row['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in row else ""
    over = f"{100 * (row['ms'] / plain['ms'] - 1):+.1f} %" if plain else ""
    return [f"{row['batch']}", f"{row['images_per_s']:.0f}", percent("mfu"), percent("mfu_with_teacher"), memory, over]


def _fastest(rows: list[dict], name: str) -> dict[int, dict]:
    """The variant's fastest row for every batch: the rival may choose all of its settings, this engine what it recomputes."""
    free = "+" if name == "strong" else "+train.recompute="
    found: dict[int, dict] = {}
    for row in sorted((row for row in rows if row["variant"].partition(free)[0] == name), key=lambda row: row["ms"]):
        found.setdefault(row["batch"], row)
    return found


def _step_table(rows: list[dict]) -> list[str]:
    heads = ["", "images per GPU", "images/s", "MFU", "MFU with teacher", "memory", "time over plain"]
    lines = [_line(heads), "|---" * len(heads) + "|"]
    for name, text in LINES.items():
        found, plain = _fastest(rows, name), _fastest(rows, "plain")
        for batch in sorted(found):
            label = f"`{found[batch]['variant']}`: {text}"
            lines.append(_line([label, *_step_cells(found[batch], plain.get(batch) if name != "plain" else None)]))
        if not found:
            lines.append(_line([f"`{name}`: {text}", "", MISSING, "", "", "", ""]))
    return lines


def render_steps(rows: list[dict]) -> list[str]:
    """The headline: one table of training steps for every GPU and commit."""
    lines = [
        f"A training step of {MODEL} at {RESOLUTION} px on one GPU, all in one run. MFU counts three passes of the student; with",
        "teacher, the projection head and the truncated teacher too. Measured and written by",
        f"`python benchmarks/train_step.py --variants {','.join(LINES)} --reference PATH && python benchmarks/table.py`",
        "(`PATH`: a checkout of the published code).",
    ]
    case = ("train_step", "step", MODEL, RESOLUTION)
    shown = [row for row in rows if tuple(row.get(k) for k in ("kind", "name", "model", "resolution")) == case]
    groups = _groups([row for row in shown if row["device"] != "cpu"])
    for title, group in groups:
        lines += ["", title, "", *_step_table(group)]
    return lines if groups else [*lines, "", *_step_table([])]


BLOCKS: dict[str, Callable[[list[dict]], list[str]]] = {"step": render_steps, "ops": render_ops}


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
