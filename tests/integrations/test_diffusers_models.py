"""One line for models of diffusers, unmodified: the same results, and how much of each is fused."""

import pytest
import torch
from one_line import EQUAL, check, enough, rewrites

from benchmarks.other_models.diffusers_models import RECIPES, TINY, build
from benchmarks.other_models.results import difference, distance, in_dtype, run
from sra_fast import integrations

diffusers = pytest.importorskip("diffusers", reason="needs diffusers")

# at least this often: adaln, gated_residual, gated_residual_adaln, gated_residual_norm
COUNTS = {
    "DiTTransformer2DModel": (1, 0, 4, 0),
    "PixArtTransformer2DModel": (1, 2, 4, 0),
    "SD3Transformer2DModel": (2, 0, 10, 0),
    "SD3Transformer2DModel, dual attention": (3, 1, 6, 0),
    "FluxTransformer2DModel": (5, 4, 6, 0),
    "QwenImageTransformer2DModel": (2, 1, 7, 0),
    "AuraFlowTransformer2DModel": (3, 3, 9, 0),
    "SanaTransformer2DModel": (1, 2, 4, 0),
    "WanTransformer3DModel": (1, 0, 6, 0),
    "WanTransformer3DModel, a time per token": (1, 0, 6, 0),
    "LTXVideoTransformer3DModel": (1, 2, 4, 0),
    "Lumina2Transformer2DModel": (6, 0, 0, 7),
    "HunyuanVideoTransformer3DModel": (4, 4, 8, 0),
    "HunyuanImageTransformer2DModel": (4, 4, 8, 0),
    "HunyuanVideo15Transformer3DModel": (3, 3, 3, 0),
    "MochiTransformer3DModel": (8, 0, 0, 6),
    "CogVideoXTransformer3DModel": (3, 1, 7, 0),
    "CogView3PlusTransformer2DModel": (2, 1, 7, 0),
    "CogView4Transformer2DModel": (2, 1, 7, 0),
    "GlmImageTransformer2DModel": (1, 1, 8, 0),
    "HiDreamImageTransformer2DModel": (4, 2, 3, 0),
    "ChromaTransformer2DModel": (4, 3, 7, 0),
    "OmniGenTransformer2DModel": (1, 0, 0, 0),
    "BriaTransformer2DModel": (5, 4, 6, 0),
    "BriaFiboTransformer2DModel": (6, 5, 5, 0),
    "Flux2Transformer2DModel": (4, 3, 7, 0),
    "ZImageTransformer2DModel": (7, 0, 0, 8),
    "SanaVideoTransformer3DModel": (1, 2, 4, 0),
    "LatteTransformer3DModel": (5, 6, 4, 0),
    "AllegroTransformer3DModel": (1, 2, 4, 0),
    "HunyuanDiT2DModel": (0, 0, 1, 0),
    "StableAudioDiTModel": (0, 0, 0, 0),
    "SkyReelsV2Transformer3DModel": (1, 0, 6, 0),
    "SkyReelsV2Transformer3DModel, a time per frame": (1, 0, 6, 0),
    "AnyFlowTransformer3DModel": (1, 0, 6, 0),
    "ChronoEditTransformer3DModel": (1, 0, 6, 0),
    "WanVACETransformer3DModel": (1, 2, 9, 0),
    "Kandinsky5Transformer3DModel": (2, 2, 6, 0),
    "PRXTransformer2DModel": (1, 0, 4, 0),
    "ErnieImageTransformer2DModel": (1, 0, 4, 0),
    "Krea2Transformer2DModel": (2, 1, 3, 0),
    "OvisImageTransformer2DModel": (5, 4, 6, 0),
    "LongCatImageTransformer2DModel": (5, 4, 6, 0),
    "JoyImageEditTransformer3DModel": (2, 1, 7, 0),
}
# they compute in fp32 whatever the dtype of their weights is
NO_TRUTH = ("Kandinsky5Transformer3DModel",)


@pytest.fixture(autouse=True)
def nothing_compiled():
    """No compiled code of another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", RECIPES)
def test_one_line_changes_only_roundings(name):
    if not hasattr(diffusers, RECIPES[name].class_name):
        pytest.skip(f"diffusers {diffusers.__version__} has no such class")
    model, inputs = build(name, True, TINY, "cpu", torch.float32)
    check(model, inputs, COUNTS[name], has_truth=name not in NO_TRUTH)


def test_ltx_with_a_time_per_token():
    """Its table is added to an embedding per token then."""
    model, inputs = build("LTXVideoTransformer3DModel", True, TINY, "cpu", torch.float32)
    images, tokens, _ = inputs["hidden_states"].shape
    inputs["timestep"] = torch.arange(100.0, 100.0 + tokens).repeat(images, 1)
    check(model, inputs, COUNTS["LTXVideoTransformer3DModel"])


@pytest.mark.parametrize(
    "name",
    [
        *("FluxTransformer2DModel", "WanTransformer3DModel"),
        "WanTransformer3DModel, a time per token",
    ],
)
def test_bf16(name):
    """As from_pretrained loads it: Wan's tables and norms stay in fp32."""
    model, inputs = build(name, True, TINY, "cpu", torch.bfloat16)
    original = run(model, inputs)
    truth = run(*in_dtype(model, inputs, torch.float64))
    integrations.compile(model, then="eager")
    fused = run(model, inputs)
    assert distance(fused, truth) <= 1.5 * distance(original, truth)
    assert enough(rewrites(model), COUNTS[name])


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        # a pair of a residual and the norm of the next block would cross a checkpoint
        ("FluxTransformer2DModel", (7, 6, 4, 0)),
        ("WanTransformer3DModel", (3, 2, 4, 0)),
    ],
)
def test_checkpoints(name, counts):
    """The bodies of checkpoints are graphs of their own, which are rewritten too."""
    model, inputs = build(name, True, TINY, "cpu", torch.float32)
    original = run(model, inputs)
    model.enable_gradient_checkpointing()
    # diffusers has checkpoints in training only; these models drop nothing
    model.train()
    integrations.compile(model, then="aot_eager")
    assert difference(run(model, inputs), original) <= EQUAL
    assert enough(rewrites(model), counts)


@pytest.mark.parametrize(
    ("name", "counts"),
    [("FluxTransformer2DModel", (4, 4, 2, 0)), ("WanTransformer3DModel", (1, 1, 2, 0))],
)
def test_blocks_compiled_one_by_one(name, counts):
    """diffusers' own way to compile every kind of block once."""
    model, inputs = build(name, True, TINY, "cpu", torch.float32)
    original = run(model, inputs)
    backend = {"backend": integrations.backend, "options": {"then": "eager"}}
    model.compile_repeated_blocks(fullgraph=True, **backend)
    assert difference(run(model, inputs), original) <= EQUAL
    assert enough(rewrites(model), counts)
    integrations.undo(model)
    assert difference(run(model, inputs), original) == 0
