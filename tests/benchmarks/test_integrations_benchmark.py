"""The benchmark of other people's models: its rows, what it refuses to time, checkouts."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import integrations as benchmark
from benchmarks.other_models.checkouts import CHECKOUTS, build, recognise

# a model in the place and with the arguments of DiT's
MODEL = """
import torch
from torch import nn
{imports}

class DiT(nn.Module):
    def __init__(self, input_size, in_channels, hidden_size, depth, num_heads, num_classes,
                 class_dropout_prob):
        super().__init__()
        self.in_channels = in_channels
        self.embed = nn.Linear(in_channels, hidden_size)
        self.modulation = nn.Linear(1, 3 * hidden_size)
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False)
        self.mlp = nn.Linear(hidden_size, hidden_size)
        self.head = nn.Linear(hidden_size, in_channels)

    def forward(self, x, t, y):
        x = self.embed(x.flatten(2).transpose(1, 2))
        # as a frequency embedding would be
        t = t[:, None].to(torch.promote_types(t.dtype, torch.float32))
        shift, scale, gate = self.modulation(t).unsqueeze(1).chunk(3, dim=2)
        x = x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)
        return self.head(x), y

def DiT_S(**options):
    return DiT(hidden_size=32, depth=1, num_heads=1, num_classes=10, in_channels=4, **options)

DiT_models = {{"DiT-S": DiT_S}}
"""
ARGUMENTS = ["--device", "cpu", "--then", "eager", "--budget", "0"]


@pytest.fixture
def rows(tmp_path):
    """Runs the benchmark; gives its exit code and the rows that it wrote."""

    def run(*words):
        torch._dynamo.reset()
        path = tmp_path / "rows.json"
        code = benchmark.main([*ARGUMENTS, *words, "--json", str(path)])
        return code, json.loads(path.read_text()) if path.exists() else []

    return run


def write_checkout(folder: Path, imports: str = "") -> Path:
    """A checkout with DiT's files."""
    (folder / "diffusion").mkdir(parents=True)
    (folder / "models.py").write_text(MODEL.format(imports=imports))
    return folder


def test_a_model_of_diffusers(rows, capsys):
    pytest.importorskip("diffusers", reason="needs diffusers")
    code, found = rows("--model", "DiTTransformer2DModel")
    said = capsys.readouterr().out
    assert code == 0
    assert [(row["variant"], row["name"]) for row in found] == [
        ("eager", "forward"),
        ("eager", "both"),
        ("ours", "forward"),
        ("ours", "both"),
    ]
    for row in found:
        assert row["kind"] == "model" and row["ms"] > 0
        assert row["model"] == "DiTTransformer2DModel, tiny"
        assert row["commit"] and row["versions"]["torch"] == torch.__version__
    assert "put in: adaln 1, gated_residual_adaln 4" in said
    assert "times ours: eager " in said


def test_wrong_results_have_no_time(rows, capsys, monkeypatch, tmp_path):
    """A program that is wrong by a thousandth is noticed."""
    compile_variant = benchmark.compile_variant

    def break_ours(model, variant, *options):
        compile_variant(model, variant, *options)
        if variant == "ours":
            model.head.register_forward_hook(lambda module, args, out: 1.001 * out)

    monkeypatch.setattr(benchmark, "compile_variant", break_ours)
    code, found = rows("--checkout", str(write_checkout(tmp_path / "DiT")))
    said = capsys.readouterr().out
    assert code == 1
    assert "ours     RED: is " in said and "times ours" not in said
    assert [("ms" in row) for row in found] == [True, True, False, False]


def test_a_checkout(rows, capsys, tmp_path):
    path = str(write_checkout(tmp_path / "DiT"))
    # in half precision by autocast: the codebases make tensors in fp32 themselves
    code, found = rows("--checkout", path, "--dtype", "bfloat16")
    assert code == 0
    assert {row["dtype"] for row in found} == {"bfloat16"}

    code, found = rows("--checkout", path)
    assert code == 0
    assert {row["model"] for row in found} == {"DiT tiny DiT"}
    assert "put in: adaln 1, gated_residual 1" in capsys.readouterr().out

    code, found = rows("--checkout", path, "--size", "default", "--model", "DiT-S")
    assert code == 0
    assert found[-1]["model"] == "DiT DiT-S" and found[-1]["resolution"] == 256


def test_pixels_of_a_checkout_are_those_of_its_autoencoder(rows, tmp_path):
    """LightningDiT's latents have 16 x 16 pixels each."""
    folder = tmp_path / "LightningDiT" / "models"
    folder.mkdir(parents=True)
    options = "class_dropout_prob, use_qknorm, use_swiglu, use_rope, use_rmsnorm"
    text = MODEL.format(imports="").replace("class_dropout_prob", options)
    text = text.replace("DiT", "LightningDiT")
    (folder / "lightningdit.py").write_text(text)
    path = str(folder.parent)
    code, found = rows("--checkout", path, "--size", "default", "--model", "LightningDiT-S")
    assert code == 0
    assert {row["resolution"] for row in found} == {256}
    code, found = rows("--checkout", path, "--side", "4")
    assert found[-1]["resolution"] == 64


def test_the_first_blocks_of_a_checkout(tmp_path):
    folder = write_checkout(tmp_path / "DiT")
    with open(folder / "models.py", "a") as file:
        file.write(
            "def deep(**options):\n"
            "    model = DiT_S(**options)\n"
            "    model.blocks = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))\n"
            "    return model\n"
            "DiT_models['DiT-D'] = deep\n"
        )
    for layers, left, name in ((2, 2, "DiT DiT-D, 2 layers"), (None, 3, "DiT DiT-D")):
        found, model, _ = build(folder, "DiT-D", 4, 1, "cpu", layers)
        assert found == name
        assert len(model.blocks) == left
    with pytest.raises(ValueError, match="--layers: expected 1 to 3 of this model, got 4"):
        build(folder, "DiT-D", 4, 1, "cpu", 4)


@pytest.mark.parametrize("option", ["layers", "kernels", "batch", "side", "frames", "text"])
def test_negative_numbers_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse(["--list", f"--{option}", "-1"])
    assert f"--{option}: expected " in capsys.readouterr().err


def test_a_program_that_cannot_be_profiled_keeps_its_times(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(benchmark, "kernel_times", fail)
    assert "no kernels: RuntimeError: out of memory" in benchmark.kernels_of(None, 3)


def test_untimed_runs_leave_no_rows(rows, tmp_path, capsys):
    path = str(write_checkout(tmp_path / "DiT"))
    assert rows("--checkout", path, "--untimed") == (0, [])


def test_decorators_of_a_checkout_are_off(rows, tmp_path):
    """The eager program is eager, and ``torch.compile`` is itself again."""
    compiler = torch.compile
    imports = (
        "@torch.compile(dynamic=True)\ndef f(): pass\nassert not hasattr(f, '_torchdynamo_inline')"
    )
    code, _ = rows("--checkout", str(write_checkout(tmp_path / "DiT", imports)))
    assert code == 0
    assert torch.compile is compiler


def test_a_checkout_that_cannot_be_used_is_one_line(rows, capsys, tmp_path):
    cases = {
        "import absent_package.part": "models.py of DiT needs the package absent_package",
        "raise OSError('no\\nlines')": "models.py of DiT cannot be imported: OSError: no",
    }
    for number, (imports, message) in enumerate(cases.items()):
        path = write_checkout(tmp_path / str(number), imports)
        assert rows("--checkout", str(path)) == (2, [])
        assert capsys.readouterr().err == f"--checkout: {message}\n"

    assert rows("--checkout", str(tmp_path)) == (2, [])
    line = capsys.readouterr().err
    assert line.startswith("--checkout: expected a checkout of SRA (SiT-SRA/models/sit.py), ")
    assert line.endswith(f"; got {tmp_path}\n") and line.count("\n") == 1

    path = write_checkout(tmp_path / "DiT")
    words = ["--checkout", str(path), "--size", "default", "--model", "DiT-B"]
    assert rows(*words) == (2, [])
    assert capsys.readouterr().err == "--model: expected one of DiT-S; got 'DiT-B'\n"


def test_checkouts_are_told_apart_by_their_files(tmp_path):
    for checkout in CHECKOUTS:
        path = tmp_path / checkout.name
        file = path / checkout.file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        beside = path / checkout.root / checkout.beside
        if not beside.exists():
            beside.touch()
        assert recognise(path) is checkout


def test_unknown_names_are_one_line(rows, capsys):
    pytest.importorskip("diffusers", reason="needs diffusers")
    assert rows("--model", "NoModel") == (2, [])
    line = capsys.readouterr().err
    assert line.startswith("--model: expected one of DiTTransformer2DModel; PixArt")
    assert line.endswith("; got 'NoModel'\n") and line.count("\n") == 1
    for words in ([], ["--model", "A", "--variants", "ours,theirs"]):
        with pytest.raises(SystemExit) as end:
            rows(*words)
        assert end.value.code == 2
    assert "expected eager, compile, ours; got theirs" in capsys.readouterr().err
