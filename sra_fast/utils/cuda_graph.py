"""Functions of tensors, replayed as CUDA graphs: the host launches one graph instead of hundreds of kernels."""

import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

WARM_UP_CALLS = 3
# what has captured graphs and is still in use
_live: weakref.WeakSet = weakref.WeakSet()


def hidden_bytes() -> int:
    """Device memory of all graphs beyond the tensors that PyTorch counts as allocated: their intermediate results live there."""
    return sum(owner.hidden_bytes for owner in _live)


class _Captures:
    """Graphs that share one pool of memory: they are replayed one after the other."""

    def __init__(self):
        self.captured: dict[Hashable, tuple] = {}
        self.hidden_bytes, self.pool = 0, None
        _live.add(self)

    def capture(self, fn: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A graph of ``fn()``, which has run before, and what it returns, which every replay writes again."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        count = lambda: torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        before, graph = count(), torch.cuda.CUDAGraph()
        try:
            # by default a loader's thread that pins a batch meanwhile would break the capture and die of it itself
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                output = fn()
        except RuntimeError as error:
            # the end of a capture that has failed fails too, and would hide why
            raise error.__context__ or error from None
        self.hidden_bytes += count() - before
        # what the capture has allocated lives in the pool, which is counted apart
        torch.cuda.reset_peak_memory_stats()
        return graph, output


def warm_up(fn: Callable[[], Any]) -> None:
    """Compile kernels and measure attention, neither of which a capture may do."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    # graphs have a pool of their own: what these calls have left would stay beside it
    torch.cuda.empty_cache()


def held_accumulators(parameters: Iterable[Tensor]) -> int:
    """How many parameters have a gradient-accumulating node of autograd's that something keeps alive.

    It is bound to the stream in which it was made.  A backward pass that is captured makes that stream wait for the capture,
    which CUDA forbids to the default one.
    """
    node = lambda p: torch.autograd.graph.get_gradient_edge(p).node
    parameters = list(parameters)
    for p in parameters:
        node(p).metadata["seen"] = True
    # of a node that was let go nothing is left: this one is new
    return sum("seen" in node(p).metadata for p in parameters)


def _signature(inputs: Iterable[Tensor]) -> tuple:
    return tuple((item.shape, item.dtype) for item in inputs)


class Graphed(_Captures):
    """``fn(*inputs)`` as a CUDA graph for each combination of shapes, captured when it is first met.

    What ``fn`` reads besides its inputs must keep its address; the output is overwritten by the next call.

    Args:
        fn: tensors to one tensor, without gradient.
    """

    def __init__(self, fn: Callable[..., Tensor]):
        super().__init__()
        self.fn = fn

    def __call__(self, *inputs: Tensor) -> Tensor:
        key = _signature(inputs)
        if key not in self.captured:
            static = [item.clone() for item in inputs]
            run = lambda: self.fn(*static)
            warm_up(run)
            self.captured[key] = static, *self.capture(run)
        static, graph, output = self.captured[key]
        for held, item in zip(static, inputs, strict=True):
            held.copy_(item)
        graph.replay()
        return output


class GraphedGradients(_Captures):
    """A loss and its gradients as one CUDA graph: forward and backward pass with the host's part of a single launch.

    Gradients come from ``torch.autograd.grad`` and are put into ``.grad`` after each replay, always the same tensors: hooks of
    parameters do not run.  What ``fn`` reads besides its inputs, the parameters among it, must keep its address.

    Args:
        fn: tensors to ``(loss [], anything)``.
        parameters: that get a gradient; all of them take part in every loss.
        graphs: False runs the same without a graph, as on a CPU.
        release: called before a capture; makes others let go of what ``held_accumulators`` counts.
    """

    def __init__(
        self,
        fn: Callable[..., tuple[Tensor, Any]],
        parameters: Iterable[Tensor],
        graphs: bool = True,
        release: Callable[[], None] = lambda: None,
    ):
        super().__init__()
        self.fn = fn
        self.parameters = list(parameters)
        self.graphs = graphs
        self.release = release
        self.gradients: list[Tensor] = []

    def __call__(self, *inputs: Tensor, accumulate: bool = False) -> Any:
        """What ``fn`` gives besides the loss, overwritten by the next call; gradients are in ``.grad``.

        Args:
            inputs: of ``fn``; for each combination of their number, shapes and dtypes there is a graph.
            accumulate: add to the gradients of the call before.
        """
        self.capture_all([(inputs, accumulate)])
        static, graph, output = self.captured[accumulate, _signature(inputs)]
        for held, item in zip(static, inputs, strict=True):
            held.copy_(item)
        if graph is None:
            output = self._step(static, accumulate)
        else:
            graph.replay()
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient
        return output

    def capture_all(self, calls: list[tuple[Iterable[Tensor], bool]]) -> None:
        """Capture what ``(inputs, accumulate)`` have no graph yet, the accumulating ones last.

        Calls that are known beforehand belong together: all are warmed up before any is captured.  Later a warm-up would need the
        memory of a whole step beside that of the graphs, which keep theirs.

        Raises:
            RuntimeError: something holds autograd's nodes of the parameters.
        """
        missing = {(accumulate, _signature(inputs)): inputs for inputs, accumulate in calls}
        new = sorted((key for key in missing if key not in self.captured), key=lambda key: key[0])
        static = {key: [item.clone() for item in missing[key]] for key in new}
        if not static:
            return
        if not self.graphs:
            self.captured |= {key: (inputs, None, None) for key, inputs in static.items()}
            return
        self.release()
        if held := held_accumulators(self.parameters):
            raise RuntimeError(
                f"a CUDA graph of the gradients: autograd's nodes of {held} parameters are held by something else"
            )
        for inputs in static.values():
            warm_up(lambda inputs=inputs: self._rehearse(inputs))
        for (accumulate, signature), inputs in static.items():
            step = lambda inputs=inputs, accumulate=accumulate: self._step(inputs, accumulate)
            self.captured[accumulate, signature] = inputs, *self.capture(step)

    def _rehearse(self, inputs: list[Tensor]) -> None:
        """Run every kernel of a step, but leave the gradients alone: accumulation has still to add to them."""
        gradients = _own(self._gradients(inputs)[1])
        torch._foreach_add_(gradients, gradients)
        torch._foreach_copy_(gradients, gradients)

    def _gradients(self, inputs: list[Tensor]) -> tuple[Any, list[Tensor]]:
        loss, output = self.fn(*inputs)
        return output, list(torch.autograd.grad(loss, self.parameters))

    def _step(self, inputs: list[Tensor], accumulate: bool) -> Any:
        output, gradients = self._gradients(inputs)
        if accumulate:
            torch._foreach_add_(self.gradients, gradients)
        elif self.gradients:
            torch._foreach_copy_(self.gradients, gradients)
        else:
            self.gradients = _own(gradients)
        return output


def _own(gradients: list[Tensor]) -> list[Tensor]:
    """The gradients as dense tensors of which none shares memory with another."""
    seen: set[int] = set()
    found = []
    for gradient in gradients:
        shared = gradient._is_view() or gradient.data_ptr() in seen or not gradient.is_contiguous()
        found.append(gradient.clone(memory_format=torch.contiguous_format) if shared else gradient)
        seen.add(found[-1].data_ptr())
    return found
