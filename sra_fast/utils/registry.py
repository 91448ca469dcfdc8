"""Sockets: what a room offers under a name, so that a new part is added without a change elsewhere.

Each registry holds one kind of part. The room that defines a part registers it:

    @SAMPLERS.register("heun")
    class Heun: ...

Scripts import the rooms before they build the parser of the command line, which takes its choices
from here (``config/cli.py``). The protocol of each kind is written where its parts live:

    PROCESSES       diffusion/process.py       how clean images become noisy ones, and the loss
    SAMPLERS        diffusion/samplers.py      from noise to images
    MODEL_FAMILIES  models/transformer.py      networks
    CONDITIONINGS   models/conditioning.py     what a network is told besides image and time
    TARGETS         alignment/target.py        what the student's features are aligned to
    DATASETS        data/training_data.py      training images
    EVALUATIONS     evaluation/digits.py       scores of samples at the end of a run
    LOGGERS         training/loggers.py        where numbers and pictures of a run go
"""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Part = TypeVar("Part")


class Registry(Generic[Part]):
    """Names of one kind of part.

    Args:
        kind: what the parts are, for error messages.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._parts: dict[str, Part] = {}

    def register(self, name: str) -> Callable[[Part], Part]:
        """A decorator that adds a part; ValueError if another part has the name."""

        def add(part: Part) -> Part:
            # the same part twice is harmless
            if self._parts.get(name, part) is not part:
                raise ValueError(f"the {self.kind} {name!r} is registered twice")
            self._parts[name] = part
            return part

        return add

    def __getitem__(self, name: str) -> Part:
        """The part; ValueError that lists what exists."""
        if name not in self._parts:
            raise ValueError(f"expected a {self.kind} of {', '.join(self._parts)}, got {name!r}")
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        """The names, in the order in which they were registered."""
        return iter(self._parts)

    def items(self) -> list[tuple[str, Part]]:
        return list(self._parts.items())

    def remove(self, name: str) -> None:
        """Forget a part: a test leaves none behind."""
        del self._parts[name]


PROCESSES: Registry = Registry("diffusion process")
SAMPLERS: Registry = Registry("sampler")
MODEL_FAMILIES: Registry = Registry("model family")
CONDITIONINGS: Registry = Registry("conditioning")
TARGETS: Registry = Registry("alignment target")
DATASETS: Registry = Registry("data set")
EVALUATIONS: Registry = Registry("evaluation")
LOGGERS: Registry = Registry("logger")
