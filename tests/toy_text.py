"""Digits with captions: features of no text encoder, which tell the digit."""

from pathlib import Path
from types import SimpleNamespace

import torch

from sra_fast.data.digits import Digits
from sra_fast.data.stored_text import StoredText, as_rows
from sra_fast.models import TextFeatures

TOKENS, WIDTH, POOLED = 5, 12, 7
# a model of these captions
MODEL = (
    "--model.name MMDiT-S/2 --model.num_classes null "
    f"--model.context_tokens {TOKENS} --model.context_size {WIDTH} --model.pooled_size {POOLED}"
)


class ToyText(StoredText):
    """Captions in memory: one to three of each image, of one to five tokens."""

    def __init__(self, labels: torch.Tensor):
        generator = torch.Generator().manual_seed(0)
        self.root = Path("toy")
        self.name = "toy"
        self.tokens, self.width, self.pooled = TOKENS, WIDTH, POOLED
        self.masked = True
        self.copies = 1
        self.dtype = torch.float32
        self.counts = 1 + torch.arange(len(labels)) % 3
        self.first_rows = self.counts.cumsum(0) - self.counts
        total = int(self.counts.sum())

        def draw(count: int) -> torch.Tensor:
            tokens = torch.randn(count, TOKENS, WIDTH, generator=generator)
            pooled = torch.randn(count, POOLED, generator=generator)
            lengths = 1 + torch.arange(count) % TOKENS
            mask = torch.arange(TOKENS) < lengths[:, None]
            return as_rows(TextFeatures(tokens, pooled, mask))

        self.rows = draw(total)
        # a caption's first token tells the digit
        self.rows[:, 0] = labels.repeat_interleave(self.counts) / 5 - 1
        self.empty = self._features(draw(1))
        self.shards = SimpleNamespace(read=lambda rows: self.rows[rows])
        self.facts = {"name": "toy", "fingerprint": "toy", "encoders": None}
        self._captions_entry = None
        self._empty_on = {}


class DigitsWithText(Digits):
    """``Digits``, each with captions."""

    def open_text(self, name: str | None = None, verify: bool = False) -> None:
        self.text = ToyText(self.labels)

    def held_out_split(self):
        parts = super().held_out_split()
        held_out = DigitsWithText(held_out=True)
        held_out.open_text()
        return [parts[0], (held_out, parts[1][1])]
