"""A function of tensors, replayed as CUDA graphs."""
from collections.abc import Callable

import torch
from torch import Tensor


class Graphed:
    """``fn(*inputs)`` as a CUDA graph for each combination of shapes, captured when it is first met.

    What ``fn`` reads besides its inputs must keep its address; the output is overwritten by the next call.

    Args:
        fn: tensors to one tensor, without gradient.
    """

    def __init__(self, fn: Callable[..., Tensor]):
        self.fn, self.captured = fn, {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        key = tuple((item.shape, item.dtype) for item in inputs)
        if key not in self.captured:
            self.captured[key] = self._capture(inputs)
        graph, static, output = self.captured[key]
        for held, item in zip(static, inputs):
            held.copy_(item)
        graph.replay()
        return output

    def _capture(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        static = [item.clone() for item in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles kernels and measures attention, neither of which a capture may do
            for _ in range(3):
                self.fn(*static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # by default a loader's thread that pins a batch meanwhile would break the capture and die of it itself
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self.fn(*static)
        return graph, static, output
