"""Read checkpoints, exports and weights of other projects, without a trainer."""

# a saved configuration names parts that these rooms register
from sra_fast import alignment, data, diffusion  # noqa: F401
