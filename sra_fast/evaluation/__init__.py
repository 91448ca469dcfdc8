"""Scores of samples: FID and the rest of the ADM suite, and scores of generated digits."""

# evaluations register themselves when they are imported
from sra_fast.evaluation import digits  # noqa: F401
