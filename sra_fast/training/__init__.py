"""The training run: plan, trainer, loop, saving, logging, monitoring."""

# first of all: it prepares the import of DeepSpeed
from sra_fast import zero  # noqa: F401
