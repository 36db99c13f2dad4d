"""The shards of an extraction, made by several Ray workers; the folder is the same, to the bit, as from one process.

    model.extract(texts, ["transformer.h.*"], "folder", workers=4)

What a shard holds follows from the request alone, and each is made whole by one worker, with as many threads as this process
would use. So it does not matter who makes which: a worker takes the next one that is missing, what a dead worker was at is
given to another, and an extraction that was killed goes on with any number of workers.
"""

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from ..activations import Form
from ..errors import ExtractError
from ..extraction import Extraction
from ..loading import Source
from . import cluster
from .addresses import Paths
from .packing import Packed, packed, unpacked
from .served import store

DEATHS: Final = 3
"""How many workers may die before the extraction is given up: what they were at may be what kills them."""


class Worker:
    """An actor that makes one shard after another."""

    def __init__(self, source: Source | None, module: Packed | None, sent: Packed, threads: int) -> None:
        """Load the model from where it comes from, or take the module that was sent, which has no such place."""
        torch.set_num_threads(threads)  # sums are divided among them, and come out otherwise with another number
        root: torch.nn.Module = unpacked(module) if module is not None else source.load()  # type: ignore[union-attr]
        self._extraction: Extraction
        self._extraction, edits = unpacked(sent, there=Paths(root).module)
        store(self._extraction.model, edits)
        self._extraction.check_weights()

    def ready(self) -> None:
        """The model is there."""

    def make(self, folder: Path, number: int, points: Mapping[str, Form]) -> int:
        """Make a shard; how many tokens it has."""
        tokens = 0

        def advance(amount: int) -> None:
            nonlocal tokens
            tokens += amount

        self._extraction.make(folder, number, points, advance)
        return tokens


class Share:
    """The shards that are missing, and who makes them."""

    def __init__(self, make_worker: Callable[[], Any], numbers: list[int], count: int) -> None:
        self._ray = cluster.ray_module()
        self._make_worker = make_worker
        self._missing = deque(numbers)
        self._workers: list[Any] = []
        self._at: dict[Any, tuple[Any, int | None]] = {}  # by what is waited for: the worker, and the shard it makes
        self._deaths = 0
        for _ in range(min(count, len(numbers))):
            self._begin()

    def run(self, folder: Path, points: Mapping[str, Form], advance: Callable[[int], None]) -> None:
        """Have all of them made."""
        while self._missing or any(number is not None for _, number in self._at.values()):
            (done,), _ = self._ray.wait([*self._at], num_returns=1)
            worker, number = self._at.pop(done)
            try:
                advance(self._ray.get(done) or 0)
            except self._ray.exceptions.RayActorError as error:
                self._died(number, error)
                continue
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from None
            if self._missing:
                following = self._missing.popleft()
                self._at[worker.make.remote(folder, following, points)] = worker, following

    def end(self) -> None:
        """End the workers."""
        for worker in self._workers:
            self._ray.kill(worker)

    def _begin(self) -> None:
        worker = self._make_worker()
        self._workers.append(worker)
        self._at[worker.ready.remote()] = worker, None

    def _died(self, number: int | None, error: Exception) -> None:
        """A worker has died: another is begun, and goes on with what this one was at."""
        self._deaths += 1
        if number is not None:
            self._missing.appendleft(number)
        cause = getattr(error, "cause", None)
        if isinstance(cause, ExtractError):
            raise cause from None
        if self._deaths > DEATHS:
            reason = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
            raise ExtractError(
                f"{self._deaths} workers have died, and the extraction is given up: {reason}",
                "Called again it goes on where it was; a smaller `batch_tokens` or fewer `workers` need less memory.",
            ) from None
        self._begin()


def share(
    extraction: Extraction,
    source: Source | None,
    folder: Path,
    numbers: list[int],
    points: Mapping[str, Form],
    advance: Callable[[int], None],
    *,
    count: int,
) -> None:
    """Have `count` workers make the shards of these numbers."""
    with cluster.here(count):
        share = Share(_workers(extraction, source), numbers, count)
        try:
            share.run(folder.resolve(), points, advance)
        finally:
            share.end()


def _workers(extraction: Extraction, source: Source | None) -> Callable[[], Any]:
    """What begins a worker; what it needs is put into Ray's store once."""
    model = extraction.model
    root, edits = model._module, model._tree.edits
    block = next((edit for edit in edits if edit.is_block), None)
    if block is not None:
        raise ExtractError(
            f"{block!r} is a block, which cannot be sent to workers.", "Write it as a function: `model.edit(function)`."
        )
    paths = Paths(root)
    known = {id(module) for module in root.modules()}

    def place(each: Any) -> Any:
        return paths.path(each) if isinstance(each, torch.nn.Module) and id(each) in known else None

    sent = packed((extraction, [(edit.label, edit._program, edit.settings) for edit in edits]), places=place)
    module = packed(root) if source is None else None
    gpus = 1.0 if any(each.device.type == "cuda" for each in root.parameters()) else 0.0
    return cluster.workers(Worker, (source, module, sent, torch.get_num_threads()), gpus)
