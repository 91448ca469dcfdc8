"""The alignment loss: where the target features come from, its weight over time, the objective."""

# the targets register themselves when they are imported
from sra_fast.alignment import ema_teacher, target  # noqa: F401
