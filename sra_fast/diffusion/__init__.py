"""Diffusion processes, samplers, and the random numbers of a training step."""
