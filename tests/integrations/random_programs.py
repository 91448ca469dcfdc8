"""Random programs of norms, modulations, gates and residuals, as no codebase writes them.

A program is a list of instructions, drawn from a seed. Some look like the patterns that are
rewritten and are none: what is computed must stay the same.
"""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, T, D = 2, 6, 16
VECTORS = 12
# shapes of modulation, the usual one more often than the others
KINDS = (
    *("image",) * 6,
    *("view", "parameter", "one image", "one row", "token", "stream", "tanh", "table"),
    *("column", "number", "tokens of one image"),
    *("table and tokens",) * 3,
)
# vectors per token that are cut out of one sum with a table
PARTS = 3


@dataclass(frozen=True)
class Step:
    """One instruction.

    Attributes:
        name: "norm", "branch", "residual", "tap", "change" or "condition".
        which: picks a layer or what is tapped.
        spelling: picks how it is written.
        kinds: of scale, shift and gate.
        first: of the vectors that it reads.
    """

    name: str
    which: int
    spelling: int
    kinds: tuple[str, str, str]
    first: int


def draw(seed: int) -> list[Step]:
    """The program of a seed: two to five half-blocks, some without a part, some disturbed."""
    rng = random.Random(seed)

    def step(name: str) -> Step:
        plain = rng.random() < 0.3
        spelling = 0 if plain else rng.randrange(1000)
        kinds = (rng.choice(KINDS), rng.choice(KINDS), rng.choice(KINDS))
        return Step(name, rng.randrange(1000), spelling, kinds, rng.randrange(VECTORS))

    steps = []
    for _ in range(rng.randint(2, 5)):
        for name in ("norm", "branch", "residual"):
            if rng.random() < 0.12:
                continue
            steps.append(step(name))
            for disturbance, chance in {"tap": 0.25, "change": 0.12, "condition": 0.06}.items():
                if rng.random() < chance:
                    steps.append(step(disturbance))
    return steps


class RandomProgram(nn.Module):
    """x ``[B, T, D]`` and c ``[B, D]`` to the last stream, and whatever was tapped."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.steps = draw(seed)
        self.condition = nn.Linear(D, VECTORS * D)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(4))
        self.parameter = nn.Parameter(0.5 * torch.randn(D))
        self.table = nn.Parameter(0.5 * torch.randn(PARTS, D))
        self.embedding = nn.Linear(D, PARTS * D)
        self.parts = random.Random(seed).randrange(1000)
        self.norms = nn.ModuleList(
            (
                nn.LayerNorm(D, eps=1e-6, elementwise_affine=False),
                nn.LayerNorm(D, bias=False),
                nn.RMSNorm(D, eps=1e-6),
                nn.RMSNorm(D, eps=1e-5, elementwise_affine=False),
                nn.LayerNorm(D),
            )
        )
        with torch.no_grad():
            for p in self.norms.parameters():
                p.add_(0.2 * torch.randn(D))

    def vector(self, kind: str, vectors, cut, number: int, x: Tensor) -> Tensor:
        """Something that can be multiplied with tokens: of ``vectors [B, D]``, or of ``cut``, one
        per token.
        """
        v = vectors[number % VECTORS]
        if kind == "view":
            return v.view(-1, 1, D)
        if kind == "parameter":
            return self.parameter
        if kind == "one image":
            return self.parameter[None, None]
        if kind == "one row":
            return self.parameter.unsqueeze(0)
        if kind == "token":
            return torch.tanh(v)[:, None] + 0.1 * self.parameter * torch.ones_like(x)
        if kind == "stream":
            return self.layers[0](x.detach())
        if kind == "tanh":
            return v[:, None].tanh()
        if kind == "table":
            return self.parameter[None, None] + v[:, None]
        if kind == "table and tokens":
            return cut[number % PARTS]
        if kind == "column":
            return v[:, :T, None]
        if kind == "number":
            return v[:, :1, None]
        if kind == "tokens of one image":
            return self.layers[1].weight[:T][None]
        return v[:, None]

    def sums(self, c: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Vectors per token, cut out of the sum of a table and an embedding."""
        e = self.embedding(x.detach() + c[:, None])
        grid = e.unflatten(-1, (PARTS, D))
        one = e[:, :, None, :D]
        spellings = (
            lambda: [p.squeeze(2) for p in (self.table[None, None] + grid).chunk(PARTS, dim=2)],
            lambda: (grid.double().float() + self.table).unbind(2),
            lambda: (e + self.table.view(-1)).chunk(PARTS, dim=-1),
            lambda: [
                p.squeeze(1) for p in (grid.transpose(1, 2) + self.table[:, None]).split(1, 1)
            ],
            lambda: [p.squeeze(2) for p in (self.table[None, None] + one).chunk(PARTS, dim=2)],
            lambda: [(self.table + grid)[:, :, i] for i in range(PARTS)],
            lambda: torch.add(grid, self.table, alpha=2).unbind(2),
            lambda: (grid.detach() + self.table).detach().unbind(2),
            lambda: (grid[:1] + self.table).unbind(2),
            lambda: [
                (self.table + grid).flatten(2)[..., i * D : (i + 1) * D] for i in range(PARTS)
            ],
            lambda: (self.table[None, :1].expand(1, PARTS, D) + grid).unbind(2),
        )
        return tuple(spellings[self.parts % len(spellings)]())

    def modulated(self, step: Step, n: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        spellings = (
            lambda: n * (1 + scale) + shift,
            lambda: shift + (1 + scale) * n,
            lambda: n * (1 + scale),
            lambda: torch.addcmul(shift, n, 1 + scale),
            lambda: n.mul(scale + 1).add(shift),
            lambda: torch.add(n * (1.0 + scale), shift),
            lambda: n * scale + shift,
            lambda: n * (2 + scale) + shift,
        )
        return spellings[step.spelling % len(spellings)]()

    def gated(self, step: Step, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        spellings = (
            lambda: x + gate * y,
            lambda: y * gate + x,
            lambda: torch.addcmul(x, gate, y),
            lambda: x.add(y * gate),
            lambda: x + y,
            lambda: x - gate * y,
            lambda: torch.add(x, gate * y, alpha=0.5),
            lambda: x.clone().add_(gate * y),
            lambda: (x.float() + y.float() * gate).type_as(x),
            lambda: x * gate + y,
        )
        return spellings[step.spelling % len(spellings)]()

    def forward(self, x, c):
        vectors = self.condition(F.silu(c)).chunk(VECTORS, dim=1)
        cut = self.sums(c, x)
        streams = [x]
        tapped = []
        y = x
        for step in self.steps:
            layer = self.layers[step.which % len(self.layers)]
            norm = self.norms[step.which % len(self.norms)]
            x = streams[-1]
            scale, shift, gate = (
                self.vector(kind, vectors, cut, step.first + i, x)
                for i, kind in enumerate(step.kinds)
            )
            if step.name == "norm":
                y = self.modulated(step, norm(x), scale, shift)
            elif step.name == "branch":
                y = F.gelu(layer(y), approximate="tanh")
                # a norm after the branch, as in a sandwich
                y = norm(y) if step.spelling % 5 == 4 else y
            elif step.name == "residual":
                streams.append(self.gated(step, x, y, gate))
            elif step.name == "tap":
                taps = (x, y, 2 * streams[step.which % len(streams)], layer(x.detach()))
                tapped.append(taps[step.spelling % len(taps)])
            elif step.name == "change":
                y = y * 1.0
                y.view(B, -1).mul_(0.9)
                x = x + 0.0
                x[:, 0] = 0.0
                streams.append(x)
            else:
                # modulation that depends on the stream
                vectors = self.condition(F.silu(c + layer(x.mean(1)))).chunk(VECTORS, dim=1)
                cut = self.sums(c, x)
        return (streams[-1], *tapped)
