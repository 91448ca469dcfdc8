"""Pictures show what the tables do, and each says which GPU it is of."""

import pytest

pyplot = pytest.importorskip("matplotlib.pyplot")

from benchmarks.report import plot  # noqa: E402

WHERE = {"device": "NVIDIA H100", "versions": {"torch": "2"}, "commit": "abc"}
CASE = {"model": "SiT-XL/2", "resolution": 256, "batch": 32}


def operator(variant: str, percent: float, dtype: str = "bfloat16", **more) -> dict:
    row = {"kind": "op", "name": "gelu.forward", "variant": variant, **WHERE, **CASE}
    return {**row, "dtype": dtype, "ms": 1.0, "percent_of_ceiling": percent, "gbps": 1.0, **more}


def step(variant: str, **more) -> dict:
    row = {"kind": "train_step", "name": "step", "variant": variant, **WHERE, **CASE, "ms": 60.0}
    return {**row, **more}


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that are drawn."""
    found = []
    monkeypatch.setattr(pyplot, "close", found.append)
    return found


def bars(figure) -> dict[str, list[float]]:
    """Variant to the widths of its bars."""
    return {each.get_label(): each.datavalues.tolist() for each in figure.axes[0].containers}


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("other", [{"dtype": "float32"}, {"batch": 256}])
def test_bars_of_an_operator_are_of_one_case_and_dtype(tmp_path, drawn, other, is_first):
    """Those of the table, wherever they stand among the rows."""
    shown = [operator("ours", 91.0), operator("compile", 60.0)]
    others = [operator(variant, 10.0, **other) for variant in ("ours", "compile", "eager")]
    rows = others + shown if is_first else shown + others
    plot.draw_operators(rows, tmp_path / "operators.png")
    assert bars(drawn[0]) == {"ours": [91.0], "compile": [60.0]}


def test_a_run_in_another_dtype_has_bars_too(tmp_path, drawn):
    rows = [operator("ours", 91.0, "float16"), operator("compile", 60.0, "float32")]
    plot.draw_operators(rows, tmp_path / "operators.png")
    assert bars(drawn[0]) == {"ours": [91.0]}


def test_every_gpu_has_pictures_of_its_own(tmp_path, monkeypatch, drawn):
    """The GPU with the most rows has those that the documents show."""
    few = [step("plain", device="NVIDIA A100"), operator("ours", 50.0, device="NVIDIA A100")]
    most = [step("plain"), step("sra"), operator("ours", 91.0)]
    fewer = [step("plain", device="NVIDIA H200")]
    monkeypatch.setattr(plot, "IMAGES", tmp_path)
    monkeypatch.setattr(plot, "load_results", lambda: few + most + fewer)
    titles = {}
    draw_steps = plot.draw_steps

    def remember(rows, path):
        draw_steps(rows, path)
        titles[path.name] = drawn[-1].axes[0].get_title()

    monkeypatch.setattr(plot, "draw_steps", remember)
    plot.main()
    case = "SiT-XL/2 256 px, 32 images"
    assert titles == {
        "steps.png": f"{case}\nNVIDIA H100",
        "steps-nvidia-a100.png": f"{case}\nNVIDIA A100",
        "steps-nvidia-h200.png": f"{case}\nNVIDIA H200",
    }
    assert {path.name for path in tmp_path.glob("operators*.png")} == {
        "operators.png",
        "operators-nvidia-a100.png",
        "operators-nvidia-h200.png",
    }
