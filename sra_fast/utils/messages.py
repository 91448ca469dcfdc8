"""What one process says for all of a launcher's."""

import logging
import os

log = logging.getLogger("sra_fast")


def rank() -> str:
    """The rank that the launcher has given this process, ``"0"`` without one."""
    # a text: read_launcher may not have checked it yet
    return os.environ.get("RANK") or "0"


def warn(message: str, *values) -> None:
    """Log a warning, once for all processes that read the same files."""
    if rank() == "0":
        log.warning(message, *values)
