"""Read checkpoints, exports and weights of other projects, without a trainer."""
