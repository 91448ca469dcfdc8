"""The benchmark of a save: its line, and that it has waited for whole checkpoints."""

import re

from tiny_config import TINY

from benchmarks.step import saving


def test_a_line_with_every_time(tmp_path, capsys):
    words = f"--batch 4 --saves 2 --steps 1 --out {tmp_path} -- --train.precision fp32"
    saving.main([*words.split(), *TINY])
    line = capsys.readouterr().out.splitlines()[-1]
    pattern = (
        r"SiT-S/2, 0\.1 M parameters, 0\.00 GB a checkpoint; a step takes \d+ ms, \d+ ms while one "
        r"is written; a save blocks \d+, \d+ ms and is whole after \d+, \d+ ms"
    )
    assert re.fullmatch(pattern, line), line
