"""What client and server say to each other.

    Message(run=3, begin=Begin(...), before=[("listen", (address,))], writes=Writes(...), verb="ask", args=(address, …))
    Answer(at=At(address, "output", step=0, times=1, …), value=Packed(...), error=None)

One message takes a run as far as it is asked to go: it has the changes made since the last one, and its answer has the value
that was asked for. So a read is one call of the actor, and an edit none of its own.
"""

import marshal
import pickle
from typing import Any, Final, NamedTuple

from .addresses import Address
from .packing import Packed

VERSION: Final = 3
PLAIN: Final = frozenset({type(None), bool, int, float, str, bytes, pickle.PickleBuffer})
"""What is sent as bytes, alone and in tuples and lists; a buffer is memory of a tensor, and meant to become bytes."""
INLINE: Final = 64 * 1024
"""The bytes of tensors that travel within an answer; more go beside it, through Ray's store, and are not copied on the way."""


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


class Arguments(NamedTuple):
    """What a module was called with: the first argument, and what is told of the others."""

    first: Packed
    others: list[Any]
    """Plain values, and a tuple for what was left on the server: the number and the form that a `Left` has."""
    positional: int
    """How many of them all have no name."""
    names: list[str]
    unchanged: bool
    """Whether they still hold what the module received."""


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


def message_sent(session: int, message: Message) -> Any:
    """A message of a client as it is sent."""
    return _sealed((session, *message))


def message_meant(sent: Any) -> tuple[int, Message]:
    """The client, and the message that was sent."""
    session, *message = _opened(sent)
    return session, Message(*message)


def answer_sent(answer: Answer) -> Any:
    """An answer as it is sent: of tuples, which pickle in a third of the time that our own classes take."""
    at, value, error = answer
    sent = value.first if isinstance(value, Arguments) else value
    plain = tuple(at), _flat(value), error
    return plain if isinstance(sent, Packed) and sent.nbytes > INLINE else _sealed(plain)


def answer_meant(sent: Any) -> Answer:
    """The answer that was sent."""
    at, (kind, *value), error = _opened(sent)
    return Answer(At(*at), MADE_OF[kind](value), error)


def _flat(value: Any) -> tuple[Any, ...]:
    """A value as a tuple, of tuples, that begins with its kind."""
    if isinstance(value, Packed):
        return "packed", *value
    if isinstance(value, Arguments):
        return "arguments", tuple(value.first), *value[1:]
    return "value", value


MADE_OF: Final[dict[str, Any]] = {
    "packed": lambda parts: Packed(*parts),
    "arguments": lambda parts: Arguments(Packed(*parts[0]), *parts[1:]),
    "value": lambda parts: parts[0],
}


def _sealed(sent: tuple[Any, ...]) -> Any:
    """What is sent as bytes, where it is made of nothing but what Python has: Ray hands bytes on as they are.

    Ray (2.60) takes 0.2 ms less for a call with them.
    """
    return marshal.dumps(sent) if _is_plain(sent) else sent


def _is_plain(value: Any) -> bool:
    """Whether `marshal` gives it back as it was: of an array or a number of numpy it would make bytes, in silence."""
    kind = type(value)
    return kind in PLAIN or ((kind is tuple or kind is list) and all(map(_is_plain, value)))


def _opened(sent: Any) -> Any:
    return marshal.loads(sent) if isinstance(sent, bytes) else sent
