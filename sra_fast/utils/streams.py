"""Streams that nobody reads any more must not stop a process that prints."""

import os
import sys


class _Lasting:
    """A text stream that may go away: what it cannot take is lost, and nothing else is."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:
            self._raise_unless_gone(error)
            return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._raise_unless_gone(error)

    def _raise_unless_gone(self, error: OSError | ValueError) -> None:
        # a closed stream raises a ValueError, and so does a character that it cannot encode
        if isinstance(error, ValueError) and not self._stream.closed:
            raise error


def outlive_streams() -> None:
    """Let the process go on when nobody reads what it prints.

    A closed terminal, a launcher that has ended and a full disk under a log file all make ``print``
    fail, in the middle of a step or of a save. Called before the libraries are imported: their log
    handlers keep the stream that they find.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # closed from the start (`2>&-`). this takes its descriptor, which otherwise would be
            # that of the next file, and what a library prints would go into a checkpoint
            stream = open(os.devnull, "w")  # noqa: SIM115 (stays open)
        if not isinstance(stream, _Lasting):
            setattr(sys, name, _Lasting(stream))
