"""The parser of programs whose options stand in no dataclass and no file."""

import re
import sys

from sra_fast.config.messages import Parser
from sra_fast.utils.registry import import_parts
from sra_fast.utils.stopping import fail

REQUIRED = re.compile(r"(the following arguments are required: )(.+)")


def import_parts_or_fail() -> None:
    """``import_parts``, before a program reads a registry; an error is one line and exit code 2."""
    try:
        import_parts()
    except ValueError as error:
        fail(f"error: {error}")


class ArgumentParser(Parser):
    """``argparse.ArgumentParser`` whose errors are one line without the usage, with exit code 2."""

    def __init__(self, **options):
        import_parts_or_fail()
        # an abbreviation would turn some typos into other options
        super().__init__(**options, allow_abbrev=False)
        self.given = sys.argv[1:]

    def error(self, message: str, ex: Exception | None = None):
        found = REQUIRED.search(message)
        if found is not None:
            message = found[1] + ", ".join(map(self._as_written, found[2].split(", ")))
        super().error(message, ex)

    def _as_written(self, name: str) -> str:
        """An argument as it stands on the command line; the parser's message has its inner name."""
        written = [action.option_strings for action in self._actions if action.dest == name]
        return written[0][0] if written and written[0] else name
