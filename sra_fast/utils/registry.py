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
    LR_SCHEDULES    config/lr_schedules.py     how the learning rate falls after its warm-up

Parts may lie outside of this package: ``SRA_FAST_IMPORT=my_parts`` names modules, separated by
commas, that are imported before a registry is read for the first time, from the working folder or
wherever Python finds them. Every program then has them.
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Part = TypeVar("Part")
IMPORT_VARIABLE = "SRA_FAST_IMPORT"


def modules_outside() -> list[str]:
    """The names in ``SRA_FAST_IMPORT``."""
    names = [name.strip() for name in os.environ.get(IMPORT_VARIABLE, "").split(",")]
    return [name for name in names if name]


@functools.cache
def import_parts() -> None:
    """Import the modules that ``SRA_FAST_IMPORT`` names, once.

    Raises:
        ValueError: there is no module of such a name. What is wrong inside of one is its own error.
    """
    names = modules_outside()
    if names and os.getcwd() not in sys.path:
        # a program's own folder is first on the path, not the one that it was started in
        sys.path.append(os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                # one that the module itself imports
                raise
            raise ValueError(
                f"{IMPORT_VARIABLE} names {name}, and there is no module {error.name} in "
                f"{os.getcwd()} or on Python's path"
            ) from error


class Registry(Generic[Part]):
    """Names of one kind of part.

    Args:
        kind: what the parts are, for error messages.
        room: the module whose import registers this package's parts, for error messages.
    """

    def __init__(self, kind: str, room: str):
        self.kind = kind
        self.room = room
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
        if name in self._parts:
            return self._parts[name]
        expected = f"expected {'an' if self.kind[0] in 'aeiou' else 'a'} {self.kind}"
        if self._parts:
            raise ValueError(f"{expected} of {', '.join(self._parts)}, got {name!r}")
        # a program that uses the package without its scripts
        raise ValueError(f"{expected}, got {name!r} before any is registered: import {self.room}")

    def __iter__(self) -> Iterator[str]:
        """The names, in the order in which they were registered."""
        return iter(self._parts)

    def items(self) -> list[tuple[str, Part]]:
        return list(self._parts.items())

    def remove(self, name: str) -> None:
        """Forget a part: a test leaves none behind."""
        del self._parts[name]


PROCESSES: Registry = Registry("diffusion process", "sra_fast.diffusion")
SAMPLERS: Registry = Registry("sampler", "sra_fast.diffusion")
MODEL_FAMILIES: Registry = Registry("model family", "sra_fast.models")
CONDITIONINGS: Registry = Registry("conditioning", "sra_fast.models")
TARGETS: Registry = Registry("alignment target", "sra_fast.alignment")
DATASETS: Registry = Registry("data set", "sra_fast.data")
EVALUATIONS: Registry = Registry("evaluation", "sra_fast.evaluation")
LOGGERS: Registry = Registry("logger", "sra_fast.training.loggers")
LR_SCHEDULES: Registry = Registry("learning-rate schedule", "sra_fast.config.lr_schedules")
