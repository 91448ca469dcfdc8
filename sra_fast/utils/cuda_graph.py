"""Functions of tensors, replayed as CUDA graphs.

The host launches one graph instead of hundreds of kernels.
"""

import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

# as many as PyTorch's documentation warms up with
WARM_UP_CALLS = 3
# what has captured graphs and is still in use
_live: weakref.WeakSet = weakref.WeakSet()


def hidden_bytes() -> int:
    """Device memory of all graphs that PyTorch does not count as allocated, in bytes.

    The intermediate results of the graphs live there.
    """
    return sum(owner.hidden_bytes for owner in _live)


class _Captures:
    """Graphs that share one pool of memory, because they are replayed one after the other."""

    def __init__(self):
        self.captured: dict[Hashable, tuple] = {}
        self.hidden_bytes = 0
        self.pool = None
        _live.add(self)

    def capture(self, fn: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        """Capture ``fn()``, which has run before.

        Returns:
            The graph, and what ``fn`` returned: every replay writes it again.
        """
        # made at the first capture: a process without a GPU never gets here
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        unallocated = lambda: torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        before = unallocated()
        graph = torch.cuda.CUDAGraph()
        try:
            # in the default mode, a loader's thread that pins a batch during the capture breaks it,
            # and fails itself
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                output = fn()
        except RuntimeError as error:
            # ending a failed capture fails too, which would hide the cause
            raise error.__context__ or error from None
        self.hidden_bytes += unallocated() - before
        # what the capture allocated lives in the pool, which hidden_bytes counts
        torch.cuda.reset_peak_memory_stats()
        return graph, output


def warm_up(fn: Callable[[], Any]) -> None:
    """Run ``fn`` a few times: kernels compile and attention is measured, which a capture
    forbids.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    # the graphs have another pool: memory cached by these calls would only occupy the device
    torch.cuda.empty_cache()


def held_accumulators(parameters: Iterable[Tensor]) -> int:
    """How many parameters have an autograd node for their gradient that something keeps alive.

    Such a node accumulates the gradient in the stream in which it was made. A captured backward
    pass makes that stream wait for the capture, which CUDA forbids for the default stream.
    """
    node = lambda p: torch.autograd.graph.get_gradient_edge(p).node
    parameters = list(parameters)
    for p in parameters:
        node(p).metadata["seen"] = True
    # a node that nothing keeps alive is gone by now, and this call makes a new one
    return sum("seen" in node(p).metadata for p in parameters)


def _signature(inputs: Iterable[Tensor]) -> tuple:
    return tuple((item.shape, item.dtype) for item in inputs)


class Graphed(_Captures):
    """``fn(*inputs)`` as a CUDA graph, captured at the first call with each combination of shapes.

    What ``fn`` reads besides its inputs must keep its address. The next call overwrites the output.

    Args:
        fn: tensors to one tensor, without gradient.
    """

    def __init__(self, fn: Callable[..., Tensor]):
        super().__init__()
        self.fn = fn

    def __call__(self, *inputs: Tensor) -> Tensor:
        key = _signature(inputs)
        if key not in self.captured:
            # a graph reads fixed addresses: every call copies its inputs to these
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
    """A loss and its gradients as one CUDA graph: a single launch for forward and backward pass.

    Gradients come from ``torch.autograd.grad`` and are put into ``.grad`` after each replay, always
    the same tensors. Hooks of parameters do not run. What ``fn`` reads besides its inputs, among it
    the parameters, must keep its address.

    Args:
        fn: tensors to ``(loss [], anything)``. No gradient may be a saved tensor or an input.
        parameters: that get a gradient; all of them take part in every loss.
        graphs: False runs the same without a graph, as on a CPU.
        release: called before a capture; frees the nodes that ``held_accumulators`` counts.
        places: tensors like the parameters that the gradients are copied to; empty: they stay where
            autograd puts them.
    """

    def __init__(
        self,
        fn: Callable[..., tuple[Tensor, Any]],
        parameters: Iterable[Tensor],
        graphs: bool = True,
        release: Callable[[], None] = lambda: None,
        places: Iterable[Tensor] = (),
    ):
        super().__init__()
        self.fn = fn
        self.parameters = list(parameters)
        self.graphs = graphs
        self.release = release
        self.gradients = list(places)

    def __call__(self, *inputs: Tensor, accumulate: bool = False) -> Any:
        """One replay. The gradients are in ``.grad`` afterwards.

        Args:
            inputs: of ``fn``. There is a graph for each combination of number, shapes and dtypes.
            accumulate: add to the gradients of the call before.

        Returns:
            What ``fn`` returns besides the loss. Tensors in it, and in its tuples, lists and dicts,
            have no history. The next call overwrites it.
        """
        self.capture_all([(inputs, accumulate)])
        static, graph, output = self.captured[accumulate, _signature(inputs)]
        for held, item in zip(static, inputs, strict=True):
            held.copy_(item)
        if graph is None:
            output = self._step(static, accumulate)
        else:
            graph.replay()
        # the optimizer has taken the gradients, or zero_grad has set them to None
        for p, gradient in zip(self.parameters, self.gradients, strict=True):
            p.grad = gradient
        return output

    def capture_all(self, calls: list[tuple[Iterable[Tensor], bool]]) -> None:
        """Capture those of the calls ``(inputs, accumulate)`` that have no graph yet.

        Calls that are known beforehand belong together: all are warmed up before any is captured.
        A later warm-up would need the memory of a whole step in addition to that of the graphs.

        Raises:
            RuntimeError: something keeps autograd nodes of the parameters alive.
        """
        # calls with the same signature share a graph
        missing = {(accumulate, _signature(inputs)): inputs for inputs, accumulate in calls}
        # accumulating calls last: they add to the gradients that the others have made
        new = sorted((key for key in missing if key not in self.captured), key=lambda key: key[0])
        static = {key: [item.clone() for item in missing[key]] for key in new}
        if not static:
            return
        if not self.graphs:
            self.captured |= {key: (inputs, None, None) for key, inputs in static.items()}
            return
        self.release()
        held = held_accumulators(self.parameters)
        if held:
            raise RuntimeError(
                f"a CUDA graph of the gradients: autograd's nodes of {held} parameters are held by "
                "something else"
            )
        # all warm-ups before the first capture, which takes the pool's memory for good
        for inputs in static.values():
            warm_up(lambda inputs=inputs: self._rehearse(inputs))
        for (accumulate, signature), inputs in static.items():
            # defaults bind the values of this round of the loop
            step = lambda inputs=inputs, accumulate=accumulate: self._step(inputs, accumulate)
            graph, output = self.capture(step)
            self.captured[accumulate, signature] = inputs, graph, output

    def _rehearse(self, inputs: list[Tensor]) -> None:
        """Run every kernel of a step without changing the gradients: later calls may add to
        them.
        """
        gradients = _own(self._gradients(inputs)[1])
        torch._foreach_add_(gradients, gradients)
        torch._foreach_copy_(gradients, gradients)

    def _gradients(self, inputs: list[Tensor]) -> tuple[Any, list[Tensor]]:
        loss, output = self.fn(*inputs)
        gradients = list(torch.autograd.grad(loss, self.parameters))
        # an output with a history would hold the nodes that ``held_accumulators`` counts
        detach = lambda item: item.detach() if isinstance(item, Tensor) else item
        return tree_map(detach, output), gradients

    def _step(self, inputs: list[Tensor], accumulate: bool) -> Any:
        output, gradients = self._gradients(inputs)
        if accumulate:
            torch._foreach_add_(self.gradients, gradients)
        # given places, or the tensors of the first graph: these are always the ones in ``.grad``
        elif self.gradients:
            torch._foreach_copy_(self.gradients, gradients)
        else:
            self.gradients = _own(gradients)
        return output


def _own(gradients: list[Tensor]) -> list[Tensor]:
    """The gradients as dense tensors, no two of which share memory.

    Autograd's are mostly that already: copying them anyway took 0.5 ms of a step of SiT-XL/2 on an
    H100.
    """
    seen: set[int] = set()
    owned = []
    for gradient in gradients:
        storage = gradient.untyped_storage()
        # a transposed transpose is a view, too, but of nothing else
        whole = gradient.is_contiguous() and storage.nbytes() == gradient.nbytes
        if not whole or storage.data_ptr() in seen:
            gradient = gradient.clone(memory_format=torch.contiguous_format)
        owned.append(gradient)
        seen.add(gradient.untyped_storage().data_ptr())
    return owned
