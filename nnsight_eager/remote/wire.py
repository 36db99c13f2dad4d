"""What client and server say to each other.

    Message(run=3, begin=Begin(...), before=[("listen", (address,))], writes=Writes(...), verb="ask", args=(address, …))
    Answer(at=At(address, "output", step=0, times=1, …), value=Packed(...), error=None)

One message takes a run as far as it is asked to go: it has the changes made since the last one, and its answer has the value
that was asked for. So a read is one call of the actor, and an edit none of its own.
"""

from typing import Any, Final, NamedTuple

from .addresses import Address
from .packing import Packed

VERSION: Final = 2


class Begin(NamedTuple):
    """The model call of a run that begins."""

    name: str
    inputs: Packed
    by_hand: bool | None  # whether what completed modules gave is kept; `None` where the run is not held by hand
    seed: int | None
    edits: Packed | None


class Writes(NamedTuple):
    """What has been changed at the visit the run is paused at, before it goes on."""

    changed: list[tuple[int, Packed]]  # tensors changed in place, by number
    replaced: tuple[str, Packed] | None  # "output", "inputs" or "skip", and what it was given


class Message(NamedTuple):
    """What one run is to do."""

    run: int
    begin: Begin | None
    before: list[tuple[str, tuple[Any, ...]]]
    writes: Writes | None
    verb: str
    args: tuple[Any, ...]


class At(NamedTuple):
    """Where a run is paused, if it is, and how far it has come."""

    address: Address | None
    kind: str
    times: int
    skipped: bool
    step: int
    begun: bool
    finished: bool


class Answer(NamedTuple):
    """What came of a message."""

    at: At
    value: Any
    error: BaseException | None


class Opened(NamedTuple):
    """What a client is told that connects: its number, which life of the actor it is of, how often to send a sign of life."""

    session: int
    life: str
    every: float


class Description(NamedTuple):
    """What a client needs to know of a model: no weights."""

    version: int
    name: str
    config: Any
    tokenizer: Any
    generation_config: Any
    dtype: str
    rename: Any


def plain(answer: Answer) -> tuple[Any, ...]:
    """An answer as it is sent: of tuples, which pickle in a third of the time that our own classes take."""
    at, value, error = answer
    return tuple(at), tuple(value) if isinstance(value, Packed) else (value,), error


def meant(sent: tuple[Any, ...]) -> Answer:
    """The answer that was sent."""
    at, value, error = sent
    return Answer(At(*at), Packed(*value) if len(value) > 1 else value[0], error)
