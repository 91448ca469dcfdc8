"""Data sets, their order during training, and the preprocessing that makes them."""
