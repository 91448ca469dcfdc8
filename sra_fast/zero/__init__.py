"""DeepSpeed ZeRO: process group, configuration, optimizer step, sharded EMA, the teacher's weights."""

import os

import torch

# before DeepSpeed is imported, which would warn that it found no accelerator
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
