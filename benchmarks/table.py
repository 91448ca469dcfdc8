"""Write the table of operators in README.md from the rows in benchmarks/results:  python benchmarks/table.py"""
import sys
from pathlib import Path

import torch
from record import load_results
from registry import ENTRIES, ROOT, Shape, cases

README = ROOT / "README.md"
BEGIN, END = "<!-- ops table begin -->", "<!-- ops table end -->"
COMMAND = "python benchmarks/run.py && python benchmarks/table.py"
MISSING = "not measured yet"


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


def render(rows: list[dict]) -> str:
    """The block of the README, with its markers: one table for every GPU and commit."""
    rows = [row for row in rows if row["kind"] == "op" and row["device"] != "cpu"]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["device"], row["commit"]), []).append(row)
    lines = [
        "Operators in bf16, L2 cold, against the bytes (attention: the FLOPs) that they cannot do without; the ceiling",
        "is the copy (matmul) rate of the same run. Measured and written by",
        f"`{COMMAND}`.",
    ]
    for (device, commit), group in sorted(groups.items()):
        copy = next((f", copy {row['gbps']:.0f} GB/s" for row in group if row["name"] == "copy"), "")
        versions = ", ".join(f"{name} {version}" for name, version in group[0]["versions"].items())
        # other dtypes are in the rows, not in the table
        shown = [row for row in group if row.get("dtype") == "bfloat16" or row["name"] == "noise_pair"]
        lines += ["", f"{device}, {versions}, commit {commit}{copy}:", "", *_table(shown)]
    if not groups:
        lines += ["", *_table([])]
    return "\n".join([BEGIN, *lines, END])


def replace_block(text: str, block: str) -> str:
    """The text with everything between the markers, and the markers, replaced."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected the lines {BEGIN} and {END} in the text")
    return head + block + tail


def main(readme: Path = README) -> None:
    readme.write_text(replace_block(readme.read_text(), render(load_results())))


if __name__ == "__main__":
    sys.exit(main())
