"""A safetensors file written piece by piece, so that no more than a piece of it is in memory.

    with shard_at(path, {"transformer.h.0.hidden": Form((768,), "float32")}, tokens=4096) as shard:
        shard.add("transformer.h.0.hidden", values)        # [n, 768]: of the next n tokens

It is written beside its place, flushed and moved there, so it is whole or absent.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

import torch

from .activations import Form
from .errors import ExtractError, InternalError

CODES: Final = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""How the format spells torch's types."""


class Shard:
    """A file that is being written: every tensor has its place in it from the start."""

    def __init__(self, file: BinaryIO, forms: Mapping[str, Form], tokens: int) -> None:
        """The header is written; `forms` are what is stored for each of the `tokens`."""
        self._file = file
        self._next: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        described, end = {}, 0
        # The widest first, as the format's own writer does: then each is aligned.
        for name, form in sorted(forms.items(), key=lambda item: (-item[1].torch_dtype.itemsize, item[0])):
            begin, end = end, end + tokens * form.nbytes
            described[name] = {"dtype": _code(form), "shape": [tokens, *form.shape], "data_offsets": [begin, end]}
            self._next[name], self._ends[name] = begin, end
        header = json.dumps(described).encode()
        header += b" " * (-len(header) % 8)
        file.write(len(header).to_bytes(8, "little") + header)
        self._data = 8 + len(header)

    def add(self, name: str, values: torch.Tensor) -> None:
        """Write what comes next of one of the tensors."""
        piece = values.contiguous().view(-1).view(torch.uint8).numpy()
        self._file.seek(self._data + self._next[name])
        self._file.write(piece.data)
        self._next[name] += piece.nbytes

    def finish(self) -> None:
        """Raise where something is missing, and have the system put the rest on its disk."""
        if self._next != self._ends:
            raise InternalError("A shard does not have the size that was written into its header.")
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def shard_at(path: Path, forms: Mapping[str, Form], tokens: int) -> Iterator[Shard]:
    """The file at `path`, there when the block has ended without an error."""
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        shard = Shard(file, forms, tokens)
        yield shard
        shard.finish()
    part.replace(path)


def _code(form: Form) -> str:
    """A type as the format spells it."""
    if form.dtype not in CODES:
        raise ExtractError(f"`torch.{form.dtype}` cannot be stored.", "Give another type: `dtype=torch.float32`.")
    return CODES[form.dtype]
