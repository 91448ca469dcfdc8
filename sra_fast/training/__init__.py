"""The training run: plan, trainer, loop, saving, logging, monitoring."""
