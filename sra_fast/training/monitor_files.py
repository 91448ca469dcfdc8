"""What a monitor leaves in the run's folder: rows of its looks, and the losses of every held-out
image.
"""

from pathlib import Path

from sra_fast.checkpoint.manifest import step_name
from sra_fast.training.rows import line_of, read_rows
from sra_fast.utils.files import write_atomic

SAMPLES = "samples.jsonl"
HELD_OUT = "held_out.jsonl"
# files of a step, by their folder
PICTURES = ("samples", ".png")
LOSSES = ("held_out", ".npz")


def picture_of(run: Path, step: int) -> Path:
    """The picture of a step's samples."""
    return _file_of(run, PICTURES, step)


def losses_of(run: Path, step: int) -> Path:
    """The held-out losses of a step."""
    return _file_of(run, LOSSES, step)


def _file_of(run: Path, kind: tuple[str, str], step: int) -> Path:
    folder, suffix = kind
    return run / folder / f"{step_name(step)}{suffix}"


def append_row(file: Path, row: dict) -> None:
    """Append a row to ``samples.jsonl`` or ``held_out.jsonl``; those of its step and later go."""
    # an interrupted run may have been further: its later rows are made again
    _write_rows(file, [*_rows_until(file, row["step"] - 1), row])


def has_row(file: Path, step: int) -> bool:
    """Whether ``samples.jsonl`` or ``held_out.jsonl`` has a row of a step."""
    return file.exists() and any(row["step"] == step for row in read_rows(file))


def remove_after(run: Path, step: int) -> int:
    """Remove what was seen after a step, which the run has given up.

    Not left to a monitor: the run that goes on may have none.

    Returns:
        Of how many steps there was something.

    Raises:
        OSError: a file cannot be written or removed.
    """
    removed = set()
    for name in (SAMPLES, HELD_OUT):
        file = run / name
        if file.exists():
            removed |= {row["step"] for row in read_rows(file) if row["step"] > step}
            # a line that was cut short is no row, and goes too
            _write_rows(file, _rows_until(file, step))
    for folder, suffix in (PICTURES, LOSSES):
        for file in run.glob(f"{folder}/step_*{suffix}"):
            number = file.stem.removeprefix("step_")
            if number.isdecimal() and int(number) > step:
                file.unlink()
                removed.add(int(number))
    return len(removed)


def _rows_until(file: Path, step: int) -> list[dict]:
    return [row for row in read_rows(file) if row["step"] <= step]


def _write_rows(file: Path, rows: list[dict]) -> None:
    text = "".join(line_of(row) for row in rows)
    write_atomic(file, lambda path: path.write_text(text))
