"""Diffusion processes, samplers, and the random numbers of a training step."""

# the parts of this room register themselves when they are imported
from sra_fast.diffusion import flow_matching, gaussian_diffusion, samplers  # noqa: F401
