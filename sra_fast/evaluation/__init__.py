"""Scores of samples: FID and the rest of the ADM suite, and scores of generated digits."""
