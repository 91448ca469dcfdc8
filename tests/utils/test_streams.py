"""A process goes on when nobody reads what it prints."""

import io
import logging
import os
import subprocess
import sys

import pytest
from launch import ROOT

from sra_fast.utils.streams import _Lasting, outlive_streams


class Gone(io.StringIO):
    """A stream whose reader has ended."""

    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise BrokenPipeError


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("make", [Gone, closed])
def test_what_a_stream_cannot_take_is_lost(monkeypatch, capsys, make, name):
    monkeypatch.setattr(sys, name, make())
    with pytest.raises((OSError, ValueError)):
        print("nothing goes on after this", file=getattr(sys, name))
    outlive_streams()
    stream = getattr(sys, name)
    print("lost", flush=True, file=stream)
    stream.writelines(["lost", "lost"])
    # a library's, made later, and the one that speaks if nobody has made one
    for handler in (logging.StreamHandler(stream), logging.lastResort):
        handler.emit(logging.makeLogRecord({"msg": "logged"}))
        handler.flush()
    # no "--- Logging error ---" with a traceback, as it would be in a thread, too
    expected = "logged\n" if name == "stdout" else ""
    assert capsys.readouterr() == ("", expected)


def test_what_a_stream_can_take_arrives(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    outlive_streams()
    outlive_streams()
    print("here")
    sys.stdout.writelines(["a", "b"])
    assert stream.getvalue() == "here\nab"
    assert sys.stdout._stream is stream


def test_a_character_that_cannot_be_encoded_is_still_an_error():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with pytest.raises(UnicodeEncodeError):
        _Lasting(stream).write("ü")


@pytest.mark.parametrize("number, name", [(1, "stdout"), (2, "stderr")])
def test_a_file_does_not_get_the_descriptor_of_a_closed_stream(tmp_path, number, name):
    source = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from sra_fast.utils.streams import outlive_streams\n"
        f"assert sys.{name} is None\n"
        "outlive_streams()\n"
        "with open(sys.argv[1], 'w') as file:\n"
        # as a library does it that is not Python
        f"    os.write({number}, b'a warning')\n"
        f"    print('a line', file=sys.{name}, flush=True)\n"
        "    file.write('weights')"
    )
    command = 'exec "$0" -c "$1" "$2" ' + f"{number}>&-"
    file = tmp_path / "weights"
    subprocess.run(["sh", "-c", command, sys.executable, source, file], check=True, env=os.environ)
    assert file.read_text() == "weights"
