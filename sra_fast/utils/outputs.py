"""What a program writes: as a whole or not at all, and never over what it reads."""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sra_fast.utils.files import make_folder, temporary_beside, write_atomic

# how the libraries that write in Rust and C++ hand on the operating system's error
OS_ERROR = re.compile(r"\(os error (\d+)\)")
# torch.save tells no reason; there is hardly another one
TORCH_WRITER = ("PytorchStreamWriter", "inline_container.cc")


def refuse_input(
    name: str,
    out: Path,
    inputs: Mapping[str, str | Path | None],
    is_earlier: Callable[[Path], bool] = lambda _: False,
) -> None:
    """ValueError if writing a file would replace what is read.

    Args:
        name: of the option that names ``out``.
        out: the file to write.
        inputs: name of an option -> the file or folder that it names; None: it names none.
        is_earlier: whether a file in a folder of inputs is none of them, because the same program
            has written it before.
    """
    for option, given in inputs.items():
        if given is None or not Path(given).exists() or not out.exists():
            continue
        path = Path(given)
        # of links too; an input that is not there is the business of whoever reads it
        same = out.samefile(path)
        within = path.is_dir() and path.resolve() in out.resolve().parents
        if same or within and not is_earlier(out):
            what = option if same else f"a file of {option}"
            raise ValueError(f"{name} {out} would replace {what} {given}: expected another name")


def check_output(
    name: str,
    out: str,
    inputs: Mapping[str, str | Path | None],
    is_earlier: Callable[[Path], bool] = lambda _: False,
) -> None:
    """ValueError unless a file can be written there and replaces none of the inputs; to be asked
    before anything takes time. Arguments: see ``refuse_input``.
    """
    path = Path(out)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{name} must be a file in a folder that exists, got {out}")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{name} {out} cannot be written: its folder is read-only")
    refuse_input(name, path, inputs, is_earlier)


@contextmanager
def as_os_error(path: Path) -> Iterator[None]:
    """What safetensors and torch raise for a file that they cannot write, as an OSError with its
    number and its name.
    """
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        found = OS_ERROR.search(str(error))
        if found is not None:
            number = int(found[1])
        elif any(word in str(error) for word in TORCH_WRITER):
            number = errno.ENOSPC
        else:
            raise
        raise OSError(number, os.strerror(number), str(path)) from None


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """The folder, made if it is not there, and removed again if nothing was written after all.

    Raises:
        ValueError: it cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield make_folder(folder)
    except BaseException:
        for path in missing:
            # it stays if something else is in it
            with suppress(OSError):
                path.rmdir()
        raise


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder in ``folder`` to write into. At the end its files and folders replace those of the
    same names in ``folder``; after an error there is nothing of it.

    Raises:
        ValueError: ``folder`` cannot be made.
        OSError: a file cannot be written.
    """
    with new_folder(folder):
        temporary = temporary_beside(folder / "new")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            with as_os_error(folder):
                yield temporary
            for path in sorted(temporary.iterdir()):
                if (folder / path.name).is_dir():
                    # a folder only replaces an empty one
                    shutil.rmtree(folder / path.name)
                os.replace(path, folder / path.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a ``.safetensors`` file as a whole or not at all; OSError, which names it, if it cannot
    be written.
    """
    with as_os_error(path):
        write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def save_npy(path: Path, array: np.ndarray) -> None:
    """``numpy.save`` under exactly this name: given a path, numpy would add a suffix."""
    with open(path, "wb") as f:
        np.save(f, array)
