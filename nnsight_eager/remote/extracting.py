"""Activations of a data set, written next to the model, and read from here.

activations = model.extract(texts, ["transformer.h.*"], "folder-on-the-server")
activations[7]["transformer.h.5"]                   # brought: [seq, hidden]
"""

import time
from collections.abc import Callable, Iterator
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Final

import torch

from ..activations import INDEX, Activations, Index, Indexed
from ..progress import progress
from .jobs import Future

Submit = Callable[..., Future]
LOOK: Final = 0.1
"""How many seconds pass between two looks at how far it has come."""


class RemoteText:
    """What a folder on the server has of one text, brought together."""

    def __init__(self, tokens: torch.Tensor, values: dict[str, torch.Tensor]) -> None:
        self.tokens = tokens
        self._values = values

    def __getitem__(self, path: str) -> torch.Tensor:
        return self._values[path]

    def keys(self) -> list[str]:
        """What is stored, by module path."""
        return [*self._values]


class RemoteActivations(Indexed):
    """The activations in a folder on the server; a text is brought when it is read."""

    def __init__(self, submit: Submit, folder: str | PathLike[str]) -> None:
        self.folder = fspath(folder)
        self._submit = submit
        self._index = submit(_index, self.folder).result()

    def __getitem__(self, text: int) -> RemoteText:
        return RemoteText(*self._submit(_text, self.folder, self.number(text)).result())

    def __iter__(self) -> Iterator[RemoteText]:
        return (self[text] for text in range(len(self)))


def extracted(submit: Submit, texts: Any, points: list[str], out: str | PathLike[str], options: dict[str, Any]) -> Any:
    """Extract next to the model, showing how far it has come; what reads the folder."""
    future = submit(_extract, texts if hasattr(texts, "columns") else [*texts], points, fspath(out), options)
    _wait(future)
    written: str = future.result()
    index = Path(out) / INDEX
    if index.exists() and index.read_text() == written:
        return Activations(out)
    return RemoteActivations(submit, out)


def _wait(future: Future) -> None:
    """Show how far it has come, until it is done."""
    while not future.progress.total and not future.done():
        time.sleep(LOOK)
    first = future.progress
    with progress("Extracting", first.total, first.done, first.what) as advance:
        shown = first.done
        while not future.done():
            time.sleep(LOOK)
            now = future.progress.done
            advance(now - shown)
            shown = now


def _extract(model: Any, texts: Any, points: list[str], out: str, options: dict[str, Any]) -> str:
    """On the server."""
    model.extract(texts, points, out, **options)
    return (Path(out) / INDEX).read_text()


def _index(_: Any, folder: str) -> Index:
    """On the server: what a folder holds."""
    return Activations(folder)._index


def _text(_: Any, folder: str, text: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """On the server: what it has of one text."""
    activations = Activations(folder)
    stored = activations[text]
    return stored.tokens, {path: stored[path] for path in activations.points}
