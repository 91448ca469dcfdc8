"""Data sets, their order during training, and the preprocessing that makes them."""

# the data sets register themselves when they are imported
from sra_fast.data import dataset, digits  # noqa: F401
