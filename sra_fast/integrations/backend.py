"""``model.compile(backend="sra_fast")``: a Dynamo backend that rewrites, then hands over.

The package's entry point makes the name known to PyTorch, so that no import of ours is needed.
Dynamo guards, graph breaks and recompilations are PyTorch's own; forward, parameters and state
dict of the model stay as they are.
"""

import logging
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch.fx import GraphModule
from torch.nn import Module

from sra_fast.integrations.report import describe, forget, forget_all, remember
from sra_fast.integrations.rewriting import rewrite

THEN = ("inductor", "aot_eager", "eager")
_logger = logging.getLogger("sra_fast.integrations")


def _next_backend(then: str, mode: str | None, options: dict[str, Any]) -> Callable[..., Any]:
    """The backend that gets the rewritten graph.

    Raises:
        ValueError: it is unknown, or cannot take ``mode`` or ``options``.
    """
    if then not in THEN:
        raise ValueError(f"sra_fast backend: then must be one of {THEN}, got {then!r}")
    if then != "inductor":
        if mode is not None or options:
            given = {"mode": mode, **options} if mode is not None else options
            raise ValueError(f"sra_fast backend: then={then!r} takes no options, got {given}")
        return torch._dynamo.lookup_backend(then)
    inductor = torch._dynamo.lookup_backend("inductor")
    # its options may be written with dashes, as torch.compile takes them
    patches = {name.replace("-", "_"): value for name, value in options.items()}
    if patches:
        from torch._inductor import list_options

        unknown = sorted(set(patches) - set(list_options()))
        if unknown:
            raise ValueError(f"sra_fast backend: inductor has no option {', '.join(unknown)}")
    if mode is not None:
        from torch._inductor import list_mode_options

        modes = list_mode_options()
        if mode not in modes:
            known = tuple(dict.fromkeys(("default", *modes)))
            raise ValueError(f"sra_fast backend: mode must be one of {known}, got {mode!r}")
        patches = {**modes[mode], **patches}
    if not patches:
        return inductor
    return lambda graph, inputs: inductor(graph, inputs, config_patches=patches)


def _take_per_token(options: dict[str, Any], then: str) -> bool:
    """Remove ``vectors_per_token`` from the options; its value, or the default.

    Raises:
        ValueError: it is neither True nor False.
    """
    given = options.pop("vectors_per_token", then != "inductor")
    if not isinstance(given, bool):
        raise ValueError(
            f"sra_fast backend: expected vectors_per_token True or False, got {given!r}"
        )
    return given


def backend(
    graph_module: GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend ``"sra_fast"``.

    Args:
        graph_module: the graph of torch calls that Dynamo made; it is changed.
        inputs: example inputs, the parameters included.
        mode: inductor's ``mode``, for example ``"max-autotune"``.
        options: ``{"then": "inductor" | "aot_eager" | "eager"}`` says which backend gets the
            rewritten graph (default: inductor); ``{"vectors_per_token": bool}`` whether patterns
            with one vector per token become operators (default: not for inductor); everything
            else is inductor's.

    Raises:
        ValueError: ``then``, ``mode`` or ``vectors_per_token`` is unknown, or ``then`` takes no
            options.
    """
    options = dict(options or {})
    name = options.pop("then", "inductor")
    per_token = _take_per_token(options, name)
    then = _next_backend(name, mode, options)
    result = rewrite(graph_module, vectors_per_token=per_token)
    record = describe(result, graph_module, inputs)
    _logger.info(
        "%d rewrites, %d near misses in a graph of %d nodes",
        len(record.result.rewrites),
        len(record.result.near_misses),
        len(graph_module.graph.nodes),
    )
    remember(record)
    return then(graph_module, inputs)


# torch._dynamo.reset() calls it
backend.reset = forget_all


def _own_forward(module: Module) -> Callable[..., Any] | None:
    """The function under the ``torch.compile`` that decorates a module's ``forward``; None without
    one.
    """
    return getattr(type(module).forward, "_torchdynamo_orig_callable", None)


def compile(model: Module, then: str = "inductor", **options: Any) -> Module:
    """Compile a model in place with the operators of ``sra_fast`` in it.

    The same as ``model.compile(backend="sra_fast", ...)``, with its arguments checked now and not
    when the model first runs. A ``forward`` that is decorated with ``@torch.compile``, as in
    LightningDiT, becomes part of the model's graph: PyTorch 2.13 cannot trace through the decorator
    if the function has default arguments.

    Args:
        model: any module. Norms with modulation and gated residuals of ``[B, T, D]`` tokens in it
            become calls of ``sra_fast.ops``; everything else stays. So does, for inductor, what has
            one vector per token, unless ``options={"vectors_per_token": True}`` asks for it.
        then: the backend that compiles the result: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
        options: arguments of ``torch.compile``: ``fullgraph``, ``dynamic``, ``mode``, ``options``.

    Returns:
        ``model`` itself. ``forward``, parameters, buffers and state dict are as before.

    Raises:
        ValueError: ``model`` is no module, or an option is unknown.
    """
    if not isinstance(model, Module):
        raise ValueError(
            f"sra_fast compile: expected a torch.nn.Module, got {type(model).__name__}"
        )
    if "backend" in options:
        raise ValueError(
            "sra_fast compile: the backend is sra_fast; then= says what comes after it"
        )
    mode = options.get("mode")
    further = options.get("options") or {}
    if not isinstance(further, dict):
        raise ValueError(f"sra_fast compile: expected options as a dict, got {further!r}")
    if mode is not None and further:
        raise ValueError("sra_fast compile: expected mode or options, got both")
    if options.get("dynamic") not in (None, True, False):
        raise ValueError(
            f"sra_fast compile: expected dynamic True, False or None, got {options['dynamic']!r}"
        )
    of_next = dict(further)
    # as model.compile takes it
    then = of_next.pop("then", then)
    _take_per_token(of_next, then)
    _next_backend(then, None if mode == "default" else mode, of_next)
    if then != "inductor":
        options["options"] = {**further, "then": then}
    for module in model.modules():
        function = _own_forward(module)
        if function is not None and "forward" not in module.__dict__:
            module.forward = MethodType(function, module)
    model.compile(backend=backend, **options)
    return model


def undo(model: Module) -> Module:
    """Take the compilation off a model and all of its submodules; it runs eagerly, as it was
    written.

    Args:
        model: a module compiled in place, or what ``torch.compile(model)`` returned. Modules that
            were compiled with other backends are taken back, too.

    Returns:
        The module itself, without a wrapper around it.
    """
    if not isinstance(model, Module):
        raise ValueError(f"sra_fast undo: expected a torch.nn.Module, got {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)
    forget(model)
    for module in model.modules():
        module._compiled_call_impl = None
        held = module.__dict__.get("forward")
        if isinstance(held, MethodType) and held.__func__ is _own_forward(module):
            del module.forward
    return model
