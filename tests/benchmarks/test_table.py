"""Tables and pictures follow the rows. Without rows of a GPU they say so."""

import pytest

from benchmarks.record import ROOT, load_results
from benchmarks.report import table

WHERE = {"device": "NVIDIA X", "versions": {"torch": "2"}, "commit": "abc"}


def on_cpu(rows: list[dict]) -> list[dict]:
    return [{**row, "device": "cpu"} for row in rows]


# operators


def operator_row(name: str, variant: str = "ours", batch: int = 32, **more) -> dict:
    case = {"model": "SiT-XL/2", "resolution": 256, "batch": batch, "dtype": "bfloat16"}
    return {"kind": "op", **WHERE, **case, "name": name, "variant": variant, **more}


OPERATOR_ROWS = [
    {"kind": "op", **WHERE, "name": "copy", "variant": "torch", "ms": 1.0, "gbps": 3000.4},
    operator_row("adaln.forward", batch=256, ms=1.0, percent_of_ceiling=11.0),
    operator_row("adaln.forward", ms=2.0, percent_of_ceiling=91.4),
    operator_row("adaln.forward", "compile", ms=3.0, percent_of_ceiling=60.0),
    operator_row("adaln.backward", ms=2.0, percent_of_ceiling=80.0),
    # rows without a time were wrong
    operator_row("adaln.backward", "compile"),
    operator_row("gated_residual.forward"),
    # the only dtype of its operator is in the table; other dtypes are not
    operator_row("noise_pair", dtype="float32", ms=1.0, percent_of_ceiling=24.0),
    operator_row("attention.forward", dtype="float32", ms=1.0, percent_of_ceiling=99.0),
]


@pytest.mark.parametrize(
    "line",
    [
        "NVIDIA X, torch 2, copy 3000 GB/s:",
        "| `adaln.forward` | 4 | SiT-XL/2, 256 px, 32 | 91 % | 1.50x |  |",
        "| `adaln.backward` | 6 | SiT-XL/2, 256 px, 32 | 80 % | rival is wrong |  |",
        "| `gated_residual.forward` | 6 | SiT-XL/2, 256 px, 32 | wrong |  |  |",
        "| `adamw_ema_` | 40 |  | not measured yet |  |  |",
        "| `noise_pair` | 20 | SiT-XL/2, 256 px, 32 | 24 % |  |  |",
        "| `attention.forward` |  |  | not measured yet |  |  |",
    ],
)
def test_table_of_operators_follows_the_rows(line):
    assert line in table.render_operators(OPERATOR_ROWS)


def test_the_title_takes_the_copy_bandwidth_from_the_row_that_has_one():
    """A step's family of kernels is called "copy" as well."""
    kernels = {"kind": "kernel_share", **WHERE, "name": "copy", "variant": "sra", "ms": 0.5}
    ((title, (run,)),) = table.newest_runs([kernels, *OPERATOR_ROWS, kernels])
    assert title == "NVIDIA X, torch 2, copy 3000 GB/s:"
    assert len(run) == len(OPERATOR_ROWS) + 2
    assert len(table.newest_rows([run])) == len(OPERATOR_ROWS) + 1


def test_rows_of_a_cpu_are_in_no_table():
    assert table.render_operators(on_cpu(OPERATOR_ROWS)) == table.render_operators([])
    assert table.render_steps(on_cpu(STEP_ROWS)) == table.render_steps([])
    assert table.render_headline(on_cpu(STEP_ROWS)) == []


@pytest.mark.parametrize("path", table.DOCUMENTS, ids=lambda path: path.name)
def test_documents_are_up_to_date(path):
    text = path.read_text()
    blocks = table.DOCUMENTS[path]
    assert table.fill(text, blocks, load_results()) == text, "run python -m benchmarks.report.table"
    for name in blocks:
        with pytest.raises(ValueError, match=f"{name} table begin"):
            table.fill(text.replace(f"<!-- {name} table begin -->", ""), blocks, [])


def test_the_tables_of_readme_have_no_empty_cells():
    """What is not measured yet stands in docs/benchmarks.md."""
    lines = (ROOT / "README.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    cells = [cell.strip() for row in rows for cell in row.strip("|").split("|")]
    assert len(rows) > 20 and "" not in cells
    assert not any(table.MISSING in row for row in rows)


# steps


def step_row(variant: str, ms: float, batch: int = 32, model: str = "SiT-XL/2", **more) -> dict:
    case = {"model": model, "resolution": 256, "batch": batch, "images_per_s": 320.0}
    row = {"kind": "train_step", "name": "step", **WHERE, **case, "variant": variant, "ms": ms}
    return {**row, **more}


STEP_ROWS = [
    step_row("plain", 100.0, mfu=0.4, mfu_with_teacher=0.4, peak_bytes=10 * 2**30),
    step_row("sra", 125.0, mfu=0.3, mfu_with_teacher=0.375, peak_bytes=12 * 2**30),
    step_row("plain+train.recompute=norm", 800.0, batch=256),
    step_row("sra+train.recompute=norm", 1000.0, batch=256),
    step_row("sra+train.recompute=norm", 126.0),
    step_row("strong", 150.0),
    step_row("strong+compile=whole", 140.0),
    step_row("sra+align.teacher_layer=14", 110.0),
    step_row("sra", 1.0, model="SiT-B/2"),
    step_row("truncated", 160.0),
    step_row("sra+align.every=2", 105.0),
]
# this engine with more than it may choose
MORE_CHOSEN = [
    step_row("sra+train.recompute=none+align.every=100", 59.0),
    step_row("sra+align.every=100+train.recompute=none", 58.0),
    step_row("sra+train.recompute=none+SRA_FAST_CUBLASLT=0", 57.0),
    step_row("plain+train.recompute=none+align.target=sra", 56.0),
    step_row("sra+train.recompute=none+an.old.setting", 55.0),
    step_row("reference+train.recompute=none", 54.0),
]


@pytest.mark.parametrize(
    "line",
    [
        "NVIDIA X, torch 2:",
        "| `plain`: this engine without alignment | 32 | 320 | 40.0 % | 40.0 % | 10.0 GiB |  | abc |",
        "| `sra`: this engine | 32 | 320 | 30.0 % | 37.5 % | 12.0 GiB | +25.0 % | abc |",
        # this engine may choose what it recomputes, a rival all of its settings
        "| `sra+train.recompute=norm`: this engine | 256 | 320 |  |  |  | +25.0 % | abc |",
        "| `strong+compile=whole`: ordinary PyTorch at its best | 32 | 320 |  |  |  | +40.0 % | abc |",
        "| `reference`: published code |  | not measured yet |  |  |  |  |  |",
        # settings against the default at the same batch
        "| `align.teacher_layer=14` | 32 | 320 |  | -12.0 % | abc |",
        "| `train.recompute=norm` | 32 | 320 |  | +0.8 % | abc |",
    ],
)
def test_tables_of_steps_follow_the_rows(line):
    assert line in table.render_steps(STEP_ROWS)


def test_what_is_in_no_table_of_steps():
    lines = table.render_steps(STEP_ROWS)
    assert sum("this engine |" in line for line in lines) == 2, "other models and settings"
    # there is no default at 256 images to compare with
    assert not any(line.startswith("| `train.recompute=norm` | 256") for line in lines)


def test_more_settings_than_recompute_are_not_this_engine():
    """In the headline, and in the lines of the table of steps."""
    assert table.render_headline(STEP_ROWS + MORE_CHOSEN) == table.render_headline(STEP_ROWS)
    lines = table._step_table([STEP_ROWS + MORE_CHOSEN])
    assert lines == table._step_table([STEP_ROWS])
    # the same setting as the base has is none
    assert table.chooses_freely("plain+align.target=none+train.recompute=norm", "plain")
    # a rival's switches are its own, what is trained is not
    assert table.chooses_freely("strong+graph=true+train.recompute=norm", "strong")
    assert not table.chooses_freely("strong+graph=true+align.every=100", "strong")


OLD = {"commit": "zzz", "date": "2026-01-01"}
NEW = {"date": "2026-01-02"}


def test_the_newest_run_counts():
    """Whatever its name and the order of the rows."""
    older = [{**row, **OLD, "ms": 1.0} for row in STEP_ROWS]
    newer = [{**row, **NEW} for row in STEP_ROWS]
    assert table.render_steps(newer + older) == table.render_steps(newer)
    older = [{**row, **OLD, "ms": 1.0} for row in OPERATOR_ROWS]
    newer = [{**row, **NEW} for row in OPERATOR_ROWS]
    assert table.render_operators(newer + older) == table.render_operators(newer)


def test_what_the_newest_run_lacks_is_taken_from_an_older_one():
    """And compared within that one."""
    older = [
        step_row("plain", 80.0, **OLD),
        step_row("sra", 100.0, **OLD),
        step_row("strong", 160.0, **OLD),
        step_row("sra+align.every=2", 90.0, **OLD),
        step_row("sra+train.compile=true", 110.0, **OLD),
        step_row("sra+train.compile=true", 20.0, **OLD, versions={"torch": "1"}),
    ]
    newer = [
        step_row("plain", 50.0, **NEW),
        step_row("sra", 60.0, **NEW),
        step_row("sra+align.every=3", 57.0, **NEW),
    ]
    lines = table.render_steps(older[:5] + newer)
    for line in (
        "| `plain`: this engine without alignment | 32 | 320 |  |  |  |  | abc |",
        "| `sra`: this engine | 32 | 320 |  |  |  | +20.0 % | abc |",
        "| `strong`: ordinary PyTorch at its best | 32 | 320 |  |  |  | +100.0 % | zzz |",
        "| `align.every=3` | 32 | 320 |  | -5.0 % | abc |",
        "| `train.compile=true` | 32 | 320 |  | +10.0 % | zzz |",
    ):
        assert line in lines
    assert not any("align.every=2" in line for line in lines)
    assert table.render_headline(older[:5] + newer) == [
        "A step of SiT-XL/2 at 256 px with 32 images on one NVIDIA X takes 60 ms with SRA, "
        "50 ms without; the same in ordinary PyTorch at its best 160 ms (2.7 times as long): [measured](#measured)."
    ]
    # nor are settings of a run whose `sra` was another
    other = [{**row, "commit": next(iter(table.OTHER_DEFAULTS))} for row in older]
    assert not any("train.compile" in line for line in table.render_steps(other[:5] + newer))
    assert table.newest_rows([newer, other[:5]]) == newer
    assert table.newest_rows([newer, older[:5]]) == [*newer, *older[2:5]]
    # runs with other versions of torch are not mixed
    other = [{**row, "versions": {"torch": "1"}} for row in older]
    assert table.render_steps(other + newer) == table.render_steps(newer)
    # nor within a commit
    same = [{**row, "commit": newer[0]["commit"]} for row in other]
    assert table.render_steps(same + newer) == table.render_steps(newer)


def test_ratios_of_operators_stay_within_a_run():
    older = [
        operator_row("gelu", ms=2.0, percent_of_ceiling=50.0, **OLD),
        operator_row("gelu", "compile", ms=3.0, percent_of_ceiling=40.0, **OLD),
    ]
    newer = [
        operator_row("gelu", ms=1.0, percent_of_ceiling=90.0, **NEW),
        operator_row("gelu", "eager", ms=4.0, percent_of_ceiling=20.0, **NEW),
    ]
    line = "| `gelu` | 6 | SiT-XL/2, 256 px, 32 | 90 % | 1.50x | 4.00x |"
    assert line in table.render_operators(older + newer)


def test_headline_sentence():
    # the rival at its fastest settings; the published code was not measured here
    assert table.render_headline(STEP_ROWS) == [
        "A step of SiT-XL/2 at 256 px with 32 images on one NVIDIA X takes 125 ms with SRA, "
        "100 ms without; the same in ordinary PyTorch at its best 140 ms (1.1 times as long): "
        "[measured](#measured)."
    ]
    without_plain = [row for row in STEP_ROWS if row["variant"] != "plain"]
    assert table.render_headline(without_plain) == []


def test_plot_of_ladder_and_depths(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from benchmarks.report.plot import draw_steps

    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    draw_steps(STEP_ROWS, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    left, right = drawn[0].axes
    # the ladder's rungs first, then the slowest first
    widths = [patch.get_width() for patch in left.patches]
    names = [label.get_text() for label in left.get_yticklabels()]
    assert widths == [160.0, 150.0, 140.0, 126.0, 125.0, 110.0, 105.0, 100.0]
    assert (names[0], names[1], names[4], names[-1]) == ("truncated", "strong", "sra", "plain")
    # what others report, as the time of 32 images
    reported = [line.get_xdata()[0] for line in left.lines]
    assert reported == pytest.approx([32e3 / 285, 32e3 / 230, 32e3 / 173])
    assert right.lines[0].get_xydata().tolist() == [[0.5, 1.1], [20 / 28, 1.25]]

    # without depths there is nothing to draw on the right
    one_depth = [row for row in STEP_ROWS if "teacher_layer" not in row["variant"]]
    draw_steps(one_depth, tmp_path / "steps.png")
    assert len(drawn[1].axes) == 1


# other people's models


def model_row(variant: str, name: str = "both", **more) -> dict:
    case = {"model": "DiT DiT-XL/2", "resolution": 256, "batch": 32, "dtype": "bfloat16"}
    return {"kind": "model", **WHERE, **case, "name": name, "variant": variant, **more}


MODEL_ROWS = [
    model_row("eager", ms=9.0),
    model_row("compile", ms=6.0, peak_bytes=2 * 2**30),
    model_row("ours", ms=5.0, peak_bytes=2**30),
    model_row("compile", "forward", ms=2.0),
    # wrong, so without a time
    model_row("ours", "forward"),
]


def test_table_of_models_follows_the_rows():
    lines = table.render_models(MODEL_ROWS)
    begin = "| DiT DiT-XL/2, bfloat16 | 256 | 32 |"
    both = " forward and backward | 9.00 | 6.00 | 5.00 | 1.20x | 2.00 GiB | 1.00 GiB | abc |"
    assert begin + both in lines
    assert f"{begin} forward |  | 2.00 | failed |  |  |  | abc |" in lines


def test_table_of_models_does_not_mix_sizes():
    """The same model with other inputs in the same run."""
    smaller = [{**model_row("eager", ms=1.0), "resolution": 128}]
    smaller.append({**model_row("ours", ms=0.5), "resolution": 128})
    lines = table.render_models([*MODEL_ROWS, *smaller])
    begin = "| DiT DiT-XL/2, bfloat16 | 128 | 32 | forward and backward |"
    assert f"{begin} 1.00 |  | 0.50 |  |  |  | abc |" in lines
    assert any("| 6.00 | 5.00 | 1.20x |" in line for line in lines)


def test_table_of_models_takes_a_line_from_one_run():
    """A newer run without ours changes nothing."""
    newer = {**model_row("compile", ms=1.0), "commit": "new", "date": "2030"}
    lines = table.render_models([*MODEL_ROWS, newer])
    assert any("| 6.00 | 5.00 | 1.20x |" in line for line in lines)


@pytest.mark.parametrize("rows", [[], on_cpu(MODEL_ROWS)])
def test_without_a_gpu_no_model_is_measured(rows):
    assert any(line.startswith("| not measured yet |") for line in table.render_models(rows))
