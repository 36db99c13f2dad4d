"""The activations of a data set on disk: what a folder of them holds, and reading it.

    activations = Activations("folder")
    activations[7].tokens                       # [seq]: the token ids of text 7
    activations[7]["transformer.h.5"]           # [seq, hidden]
    for shard in activations.shards():
        shard["transformer.h.5"]                # [tokens, hidden]

A folder has an `index.json` and the shards it names, safetensors files, and is finished when all of them are there. Nothing is
read before it is used, and nothing but what is used.
"""

import json
import operator
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final

import torch

from .errors import ExtractError
from .paths import near

INDEX: Final = "index.json"
VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Form:
    """What is stored of a point for each token: its shape, and the name of its dtype as torch spells it."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def nbytes(self) -> int:
        """How many bytes a token takes."""
        return torch.Size(self.shape).numel() * self.torch_dtype.itemsize


@dataclass(frozen=True, slots=True)
class Index:
    """What a folder holds or will hold; everything but the values."""

    model: str
    request: dict[str, Any]
    """What was asked for. An extraction goes on only where it is asked for the same."""
    points: dict[str, Form]
    """By module path, in the order the model comes by them."""
    lengths: list[int]
    """The tokens of each text."""
    shards: list[list[int]]
    """The texts of each shard, in the order they are stored."""

    def missing(self, folder: Path) -> list[int]:
        """The numbers of the shards that are not there."""
        return [number for number in range(len(self.shards)) if not shard_path(folder, number).exists()]

    def tokens_in(self, shard: int) -> int:
        """How many tokens a shard has."""
        return sum(self.lengths[text] for text in self.shards[shard])

    def written(self) -> str:
        """The index as JSON."""
        return json.dumps({"version": VERSION, **asdict(self)})


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard is."""
    return folder / f"shard-{number:05}.safetensors"


def key_of(path: str) -> str:
    """The name in a shard of what is stored of a module; no module path makes it `row`, `position` or `token`."""
    return f"{path}.hidden"


def index_of(folder: Path) -> Index | None:
    """What `folder` holds or will hold; `None` where it has no index."""
    try:
        found = json.loads((folder / INDEX).read_text())
        if found.pop("version") != VERSION:
            raise ExtractError(
                f"`{folder}` was written by another version of this package.", "Read it with that version, or extract again."
            )
        points = {path: Form(tuple(form["shape"]), form["dtype"]) for path, form in found.pop("points").items()}
        return Index(points=points, **found)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExtractError(
            f"`{folder / INDEX}` is not the index of an extraction: {error}", "Give a folder that `model.extract` has written."
        ) from None


@dataclass(frozen=True, slots=True)
class Stored:
    """Tokens that follow each other in one shard: those of a text, or all of them."""

    file: Path
    start: int
    stop: int
    points: Mapping[str, Form]

    def __getitem__(self, point: str) -> torch.Tensor:
        """What is stored of a point, `[tokens, ...]`; memory-mapped, so it is read when it is used."""
        path = point if point in self.points else point.removeprefix("model.")
        if path not in self.points:
            raise ExtractError(
                f"Nothing is stored of `{point}`{near(point, self.points)}",
                f"There is {', '.join(f'`{each}`' for each in self.points)}.",
            )
        return self._stored(key_of(path))

    @property
    def tokens(self) -> torch.Tensor:
        """The token ids, `[tokens]`."""
        return self._stored("token")

    @property
    def rows(self) -> torch.Tensor:
        """Which text each token is of, `[tokens]`."""
        return self._stored("row")

    @property
    def positions(self) -> torch.Tensor:
        """Where in its text each token stands, `[tokens]`."""
        return self._stored("position")

    def _stored(self, key: str) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self.file, "pt") as file:
            return file.get_slice(key)[self.start : self.stop]  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return self.stop - self.start

    def __repr__(self) -> str:
        return f"<{len(self)} tokens of {self.file.name}: {', '.join(self.points)}>"


class Indexed:
    """What the index of a folder tells of the activations in it."""

    _index: Index

    @property
    def points(self) -> dict[str, Form]:
        """What is stored for each token, by module path, in the order the model comes by them."""
        return self._index.points

    @property
    def lengths(self) -> list[int]:
        """The tokens of each text."""
        return self._index.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def number(self, text: int) -> int:
        """Which text is meant: from the end where it is negative."""
        number = operator.index(text)
        if not -len(self) <= number < len(self):
            raise IndexError(f"There are {len(self)} texts; there is no [{number}].")
        return number % len(self)


class Activations(Indexed):
    """The activations of a data set, as `model.extract` has written them.

        activations = Activations("folder")
        activations[7]["transformer.h.5"]           # [seq, hidden]: by text
        for shard in activations.shards():          # all tokens, to train on
            shard["transformer.h.5"]                # [tokens, hidden]

    `points` are the stored points with their shapes, `lengths` the tokens of each text. Raises `ExtractError` where the folder
    is none, or is not finished.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder = Path(folder)
        index = index_of(self.folder)
        if index is None:
            raise ExtractError(
                f"`{self.folder}` holds no activations.", "Give a folder that `model.extract(..., out=folder)` has written."
            )
        missing = index.missing(self.folder)
        if missing:
            raise ExtractError(
                f"`{self.folder}` is not finished: {len(missing)} of {len(index.shards)} shards are missing.",
                "Call `model.extract` again as it was called; it goes on where it was.",
            )
        self._index = index
        self._places: dict[int, tuple[int, int]] = {}
        for shard, texts in enumerate(index.shards):
            start = 0
            for text in texts:
                self._places[text] = shard, start
                start += index.lengths[text]

    def __getitem__(self, text: int) -> Stored:
        """One text, by its row in the data set."""
        number = self.number(text)
        shard, start = self._places[number]
        return Stored(shard_path(self.folder, shard), start, start + self.lengths[number], self.points)

    def __iter__(self) -> Iterator[Stored]:
        return (self[text] for text in range(len(self)))

    def shards(self) -> Iterator[Stored]:
        """The shards one after another: all tokens of all texts, long texts first."""
        for number in range(len(self._index.shards)):
            yield Stored(shard_path(self.folder, number), 0, self._index.tokens_in(number), self.points)

    def __repr__(self) -> str:
        tokens = sum(self.lengths)
        size = tokens * sum(form.nbytes for form in self.points.values())
        stored = ", ".join(f"{path} {list(form.shape)} {form.dtype}" for path, form in self.points.items())
        return f"<Activations of {self._index.model}: {len(self)} texts, {tokens} tokens, {size / 1e6:.1f} MB: {stored}>"
