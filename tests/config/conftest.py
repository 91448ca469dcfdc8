"""The parser offers what is registered. Importing the rooms registers it, whichever tests run."""

import importlib

for room in ("alignment", "data", "diffusion", "evaluation"):
    importlib.import_module(f"sra_fast.{room}")
