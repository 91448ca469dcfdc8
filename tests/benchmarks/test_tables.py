"""Tables and pictures follow the rows; without rows of a GPU they say so."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import record  # noqa: E402
import table  # noqa: E402


def example_rows() -> list[dict]:
    common = {
        "kind": "op",
        "device": "NVIDIA X",
        "versions": {"torch": "2"},
        "commit": "abc",
        "command": "c",
    }
    case = {**common, "model": "SiT-XL/2", "resolution": 256, "dtype": "bfloat16"}
    return [
        {**common, "name": "copy", "variant": "torch", "ms": 1.0, "gbps": 3000.4},
        {
            **case,
            "name": "adaln.forward",
            "variant": "ours",
            "batch": 256,
            "ms": 1.0,
            "percent_of_ceiling": 11.0,
        },
        {
            **case,
            "name": "adaln.forward",
            "variant": "ours",
            "batch": 32,
            "ms": 2.0,
            "percent_of_ceiling": 91.4,
        },
        {
            **case,
            "name": "adaln.forward",
            "variant": "compile",
            "batch": 32,
            "ms": 3.0,
            "percent_of_ceiling": 60.0,
        },
        {
            **case,
            "name": "adaln.backward",
            "variant": "ours",
            "batch": 32,
            "ms": 2.0,
            "percent_of_ceiling": 80.0,
        },
        {**case, "name": "adaln.backward", "variant": "compile", "batch": 32},
        {**case, "name": "gated_residual.forward", "variant": "ours", "batch": 32},
    ]


def test_table_follows_the_rows():
    block = "\n".join(table.render_ops(example_rows()))
    assert "NVIDIA X, torch 2, commit abc, copy 3000 GB/s:" in block
    assert "| `adaln.forward` | 4 | SiT-XL/2, 256 px, 32 | 91 % | 1.50x |  |" in block
    assert "| `adaln.backward` | 6 | SiT-XL/2, 256 px, 32 | 80 % | rival is wrong |  |" in block
    assert "| `gated_residual.forward` | 6 | SiT-XL/2, 256 px, 32 | wrong |  |  |" in block
    assert "| `adamw_ema_` | 40 |  | not measured yet |  |  |" in block
    on_cpu = [{**row, "device": "cpu"} for row in example_rows()]
    assert (
        table.render_ops(on_cpu) == table.render_ops([])
        and str(table.render_ops([])).count("not measured yet") == 19
    )


def test_readme_is_up_to_date():
    text = (ROOT / "README.md").read_text()
    assert table.fill(text, record.load_results()) == text, "run python benchmarks/table.py"
    with pytest.raises(ValueError, match="ops table begin"):
        table.fill(text.replace("<!-- ops table begin -->", ""), [])


def step_rows() -> list[dict]:
    common = {
        "kind": "train_step",
        "name": "step",
        "device": "NVIDIA X",
        "versions": {"torch": "2"},
        "commit": "abc",
    }
    case = {**common, "model": "SiT-XL/2", "resolution": 256, "batch": 32, "images_per_s": 320.0}
    return [
        {
            **case,
            "variant": "plain",
            "ms": 100.0,
            "mfu": 0.4,
            "mfu_with_teacher": 0.4,
            "peak_bytes": 10 * 2**30,
        },
        {
            **case,
            "variant": "sra",
            "ms": 125.0,
            "mfu": 0.3,
            "mfu_with_teacher": 0.375,
            "peak_bytes": 12 * 2**30,
        },
        {**case, "variant": "plain+train.recompute=norm", "batch": 256, "ms": 800.0},
        {**case, "variant": "sra+train.recompute=norm", "batch": 256, "ms": 1000.0},
        {**case, "variant": "sra+train.recompute=norm", "ms": 126.0},
        {**case, "variant": "strong", "ms": 150.0},
        {**case, "variant": "strong+compile=whole", "ms": 140.0},
        {**case, "variant": "sra+align.teacher_layer=14", "ms": 110.0},
        {**case, "variant": "sra", "model": "SiT-B/2", "ms": 1.0},
        {**case, "variant": "truncated", "ms": 160.0},
        {**case, "variant": "sra+align.every=2", "ms": 105.0},
    ]


def test_headline_follows_the_rows():
    block = "\n".join(table.render_steps(step_rows()))
    assert "NVIDIA X, torch 2, commit abc:" in block
    assert (
        "| `plain`: this engine without alignment | 32 | 320 | 40.0 % | 40.0 % | 10.0 GiB |  |"
        in block
    )
    assert "| `sra`: this engine | 32 | 320 | 30.0 % | 37.5 % | 12.0 GiB | +25.0 % |" in block
    # what is recomputed is this engine's choice, all settings are the rival's
    assert "| `sra+train.recompute=norm`: this engine | 256 | 320 |  |  |  | +25.0 % |" in block
    assert (
        "| `strong+compile=whole`: plain PyTorch at its best | 32 | 320 |  |  |  | +40.0 % |"
        in block
    )
    assert (
        "| `reference`: published code |  | not measured yet |" in block
        and block.count("this engine |") == 2
    )
    # settings against the default at the same batch
    assert (
        "| `align.teacher_layer=14` | 32 | 320 |  | -12.0 % |" in block
        and "| `train.recompute=norm` | 32 | 320 |  | +0.8 % |" in block
    )
    assert "`train.recompute=norm` | 256" not in block, "there is no default to compare with"
    # of a GPU's rows the newest commit's count, whatever its name
    older = [{**row, "commit": "zzz", "date": "2026-01-01", "ms": 1.0} for row in step_rows()]
    newer = [{**row, "date": "2026-01-02"} for row in step_rows()]
    assert table.render_steps(newer + older) == table.render_steps(newer)
    on_cpu = [{**row, "device": "cpu"} for row in step_rows()]
    assert (
        table.render_steps(on_cpu) == table.render_steps([])
        and str(table.render_steps([])).count("not measured yet") == 6
    )


def test_headline_sentence():
    (line,) = table.render_headline(step_rows())
    assert (
        "SiT-XL/2 at 256 px with 32 images on one NVIDIA X takes 125 ms with SRA, 100 ms without"
        in line
    )
    # the rival at its fastest settings; of the published code nothing is known here
    assert (
        "plain PyTorch at its best 140 ms (1.1 times as long): [measured](#measured)." in line
        and "published" not in line
    )
    assert table.render_headline([row for row in step_rows() if row["variant"] != "plain"]) == []


def test_plot_of_ladder_and_depths(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from plot import draw_steps

    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    draw_steps(step_rows(), tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    left, right = drawn[0].axes
    # the ladder's rungs first, then the slowest first
    widths, names = (
        [patch.get_width() for patch in left.patches],
        [label.get_text() for label in left.get_yticklabels()],
    )
    assert widths == [160.0, 150.0, 140.0, 126.0, 125.0, 110.0, 105.0, 100.0]
    assert (names[0], names[1], names[4], names[-1]) == ("truncated", "strong", "sra", "plain")
    assert [line.get_xdata()[0] for line in left.lines] == pytest.approx(
        [32e3 / 285, 32e3 / 230, 32e3 / 173]
    )
    assert right.lines[0].get_xydata().tolist() == [[0.5, 1.1], [20 / 28, 1.25]]
    # without depths there is nothing to draw on the right
    draw_steps(
        [row for row in step_rows() if "teacher_layer" not in row["variant"]],
        tmp_path / "steps.png",
    )
    assert len(drawn[1].axes) == 1
