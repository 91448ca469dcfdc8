"""The tensors of a checkpoint: pieces of flat fp32 tensors, one safetensors file of every rank.

A piece has the key ``<kind>/<parameter>/<first element>``. The kinds are ``master`` (the fp32
weights), ``exp_avg`` and ``exp_avg_sq`` (AdamW's moments) and ``ema.<name>``. Whatever number of
processes and whatever ZeRO stage wrote the pieces, any other can read what it needs of them.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sra_fast.checkpoint.manifest import DamagedCheckpoint, StoredFile
from sra_fast.utils.files import ABSENT, require, sync_folder, temporary_beside, unreadable

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
CHUNK = 8 << 20
# names of safetensors
DTYPES = {torch.float32: "F32", torch.float16: "F16"}


def ema_kind(name: str) -> str:
    """The kind of an EMA's pieces."""
    return f"ema.{name}"


def piece_key(kind: str, name: str, start: int) -> str:
    """The name of a piece in its file."""
    return f"{kind}/{name}/{start}"


def write_pieces(
    path: Path, pieces: Mapping[str, Tensor], at_phase: Callable[[str], None] = lambda name: None
) -> StoredFile:
    """Write a safetensors file in one pass that also computes its hash.

    Writing and hashing leave the interpreter to other threads. The file has a temporary name until
    it is on the disk.

    Args:
        path: of the file.
        pieces: key -> contiguous 1-d tensor in host memory, fp32 or fp16.
        at_phase: called with ``file_begun``, ``file_half``, ``file_written`` and ``file_renamed``.

    Raises:
        OSError: it cannot be written; nothing is left of it then.
    """
    temporary = temporary_beside(path)
    digest = hashlib.sha256()
    header = _header(pieces)
    total = len(header) + sum(piece.nbytes for piece in pieces.values())
    written = 0
    half_said = False
    try:
        with open(temporary, "wb") as file:
            at_phase("file_begun")
            for chunk in _chunks(header, pieces.values()):
                digest.update(chunk)
                file.write(chunk)
                written += len(chunk)
                if not half_said and 2 * written >= total:
                    half_said = True
                    file.flush()
                    at_phase("file_half")
            file.flush()
            os.fsync(file.fileno())
        at_phase("file_written")
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    at_phase("file_renamed")
    return StoredFile(total, digest.hexdigest())


def _header(pieces: Mapping[str, Tensor]) -> bytes:
    """Length and JSON of the header of safetensors' format, filled up to a multiple of 8 bytes."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, piece in pieces.items():
        assert piece.dim() == 1 and piece.is_contiguous()
        end = offset + piece.nbytes
        entries[key] = {
            "dtype": DTYPES[piece.dtype],
            "shape": [piece.numel()],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(header: bytes, pieces: Iterable[Tensor]):
    yield memoryview(header)
    for piece in pieces:
        data = memoryview(piece.numpy().view(np.uint8))
        for begin in range(0, len(data), CHUNK):
            yield data[begin : begin + CHUNK]


@dataclass(frozen=True)
class _Piece:
    start: int
    end: int
    file: str
    key: str


class Shards:
    """The pieces of a checkpoint, read where they are needed.

    Args:
        folder: of the checkpoint.
        names: of its files.
        dtype: of the pieces.

    Raises:
        DamagedCheckpoint: a file is not there, or holds something else.
        ValueError: safetensors is not installed, or the file system could not read a file.
    """

    def __init__(self, folder: Path, names: Iterable[str], dtype: torch.dtype = torch.float32):
        require("safetensors", "safetensors", "train")
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        self.dtype = dtype
        self._files = {}
        # kind -> parameter -> its pieces in order
        self._pieces: dict[str, dict[str, list[_Piece]]] = {}
        for name in names:
            try:
                file = safe_open(folder / name, "pt")
                self._files[name] = file
                for key in file.keys():  # noqa: SIM118 (no dict)
                    self._add(name, key, file.get_slice(key))
            except OSError as error:
                if error.errno is not None and error.errno not in ABSENT:
                    raise unreadable(folder / name, error) from None
                raise DamagedCheckpoint(f"{folder / name} cannot be read: {error}") from None
            except (SafetensorError, ValueError) as error:
                raise DamagedCheckpoint(f"{folder / name} cannot be read: {error}") from None
        for parameters in self._pieces.values():
            for pieces in parameters.values():
                pieces.sort(key=lambda piece: (piece.start, piece.end))

    def _add(self, file: str, key: str, held) -> None:
        kind, name, start = key.split("/")
        shape = held.get_shape()
        expected = DTYPES[self.dtype]
        if held.get_dtype() != expected or len(shape) != 1 or not start.isdecimal():
            raise ValueError(f"{key} is no piece of a flat tensor of dtype {expected}")
        piece = _Piece(int(start), int(start) + shape[0], file, key)
        self._pieces.setdefault(kind, {}).setdefault(name, []).append(piece)

    def check(self, kinds: Iterable[str], sizes: Mapping[str, int]) -> None:
        """Check that every element of every parameter is there, once.

        Args:
            kinds: what is needed.
            sizes: parameter -> its number of elements.

        Raises:
            ValueError: the parameters are those of another model.
            DamagedCheckpoint: elements are missing, or there twice.
        """
        for kind in kinds:
            held = self._pieces.get(kind, {})
            for name in sorted(set(sizes) ^ set(held)):
                where = "lacks" if name in sizes else "has besides"
                raise ValueError(f"{self.folder} {where} {kind} of {name}")
            for name, size in sizes.items():
                self._check_one(kind, name, held[name], size)

    def _check_one(self, kind: str, name: str, pieces: list[_Piece], size: int) -> None:
        end = 0
        for piece in pieces:
            if piece.start != end:
                fault = "lacks elements" if piece.start > end else "has elements twice"
                low, high = sorted((piece.start, end))
                raise DamagedCheckpoint(f"{self.folder}: {kind} of {name} {fault}: {low} to {high}")
            end = piece.end
        if end != size:
            raise ValueError(
                f"{self.folder} does not fit the model: {name} should have {size} elements, "
                f"{kind} has {end}"
            )

    def read_into(self, kind: str, name: str, start: int, out: Tensor) -> None:
        """Copy elements ``start`` to ``start + len(out)`` of a parameter into ``out``, 1-d float.

        Call ``check`` before: elements that are not there would be left as they are.
        """
        end = start + out.numel()
        for piece in self._pieces[kind][name]:
            first = max(start, piece.start)
            last = min(end, piece.end)
            if first < last:
                held = self._files[piece.file].get_slice(piece.key)
                values = held[first - piece.start : last - piece.start]
                out[first - start : last - start].copy_(values)

    def whole(self, kind: str) -> dict[str, Tensor]:
        """``{parameter: flat fp32 tensor}`` of a kind.

        Raises:
            DamagedCheckpoint: elements are missing, or there twice.
        """
        full = {}
        for name, pieces in self._pieces.get(kind, {}).items():
            out = torch.empty(max(piece.end for piece in pieces))
            self._check_one(kind, name, pieces, out.numel())
            self.read_into(kind, name, 0, out)
            full[name] = out
        return full
