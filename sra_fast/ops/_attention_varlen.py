"""Attention inside runs of tokens as one call of a variable-length kernel: PyTorch's, or that of a
FlashAttention package.

Import it where it is needed: PyTorch's function brings the compiler along, 1.5 s on a CPU.
"""

import functools
import importlib
from itertools import accumulate, chain
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen

from sra_fast.ops._attention_segments import Runs


def in_one_call(package: str | None, q: Tensor, k: Tensor, v: Tensor, runs: Runs | None) -> Tensor:
    """Attention ``[B, T, H, d]`` by the kernel of ``package``, or of PyTorch if that is None.

    The kernels take all tokens in a row, ``[B T, H, d]``: a view, if tokens lie before heads in
    memory. Without runs a query attends to all keys of its image.
    """
    B, T = q.shape[:2]
    # a compiler may trace with symbols for sizes; the offsets need numbers
    num_images = index(B)
    q_runs = k_runs = runs
    if q_runs is None or k_runs is None:
        q_runs = ((index(T),),)
        k_runs = ((index(k.shape[1]),),)
    q_ends = _offsets(q_runs, num_images, q.device)
    k_ends = _offsets(k_runs, num_images, q.device)
    q_longest = max(max(run) for run in q_runs)
    k_longest = max(max(run) for run in k_runs)
    rows = (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
    if package is None:
        # an argument only where it is needed: it is younger than the function
        options: dict[str, Any] = {"enable_gqa": True} if k.shape[2] != q.shape[2] else {}
        out = varlen.varlen_attn(*rows, q_ends, k_ends, q_longest, k_longest, **options)
    else:
        # by name: after these arguments every version goes on in its own way
        out = importlib.import_module(package).flash_attn_varlen_func(
            *rows,
            cu_seqlens_q=q_ends,
            cu_seqlens_k=k_ends,
            max_seqlen_q=q_longest,
            max_seqlen_k=k_longest,
        )
    # some versions return the log-sum-exp too
    out = out[0] if isinstance(out, tuple) else out
    return out.unflatten(0, (B, T))


# a compiler must not trace it: the copy to the device would be made in every call
@torch.compiler.assume_constant_result
def _offsets(runs: Runs, num_images: int, device: torch.device) -> Tensor:
    """int32: where every run of every image begins among all tokens, and where the last one ends.

    Made once and never dropped: a captured CUDA graph has its address.
    """
    return _cached_offsets(runs, num_images, device)


@functools.cache
def _cached_offsets(runs: Runs, num_images: int, device: torch.device) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("these segments must run once before a CUDA graph is captured")
    lengths = chain.from_iterable(runs * num_images if len(runs) == 1 else runs)
    # an ordinary tensor, also if the first call is one of inference mode: a later one may train
    with torch.inference_mode(False):
        return torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32, device=device)
