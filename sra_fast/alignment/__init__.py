"""The alignment loss: where the target features come from, its weight over time, the objective."""

# the targets register themselves when they are imported
from sra_fast.alignment import (  # noqa: F401
    cached_features,
    dispersive,
    dual_time,
    ema_teacher,
    layer_sync,
    self_flow,
    target,
    vae_latent,
)
