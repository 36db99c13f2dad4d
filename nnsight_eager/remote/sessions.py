"""Who is connected, and what they have here: runs, handles, and when they were last heard of.

sessions = Sessions(limits, open)
session = sessions.open("alice@laptop")
session.heard()
sessions.close_silent(end)        # those who have given no sign of life for too long, and runs nobody has touched
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ..errors import RemoteError, RunEndedError
from ..model import NNsight
from ..nested import described
from .holding import nbytes
from .lanes import Lane
from .served import ServedRun


class Limits(NamedTuple):
    """What a client may have: seconds, and bytes."""

    silence: float = 15.0
    """A client that gives no sign of life for so long is taken for dead."""
    idle: float = 1800.0
    """A run that nobody has touched for so long is closed."""
    memory: int | None = None
    """What the runs, caches and handles of one client may hold."""
    rows: int = 32
    """How many rows a forward pass may have that the functions of several clients share."""


class Seat:
    """A run, the lane it lives on, and when it was last touched."""

    run: ServedRun

    def __init__(self, lane: Lane) -> None:
        """The run is made on the lane."""
        self.lane: Lane | None = lane
        """Nothing once the run has ended: what it has left can be read on any thread."""
        self.touched = time.monotonic()
        self.busy = False
        self.bytes = 0
        """What it held when it was last looked at, which is done on its lane."""

    @property
    def ended(self) -> bool:
        """Whether the run has ended, and only its result and its caches are there."""
        return self.lane is None

    def do(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function` where the run lives."""
        return function(*args) if self.lane is None else self.lane.do(function, *args)


class Session:
    """One client."""

    model: NNsight
    """The model as this client has it, with edits of its own."""

    def __init__(self, number: int, owner: str) -> None:
        self.number = number
        self.owner = owner
        self.in_order = threading.Lock()
        """Held by the function that runs: those of one client run one after another."""
        self.seats: dict[int, Seat] = {}
        self.refs: dict[int, torch.Tensor] = {}
        self.ended: dict[int, str] = {}
        """Why a run is not there any more."""
        self.cancelled: set[int] = set()
        self.open = True
        self._lock = threading.Lock()
        self._under_way = 0
        self._later: list[Callable[[], None]] = []
        self._refs = itertools.count()
        self._heard = time.monotonic()

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """A call of this client, from its begin to its end on all ranks; `KeyError` where the client is going."""
        with self._lock:
            if not self.open:
                raise KeyError(self.number)
            self._under_way += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1
                due = [] if self._under_way else self._later
                self._later = self._later if self._under_way else []
            for do in due:
                do()

    def when_quiet(self, do: Callable[[], None]) -> None:
        """Do something as soon as no call of this client is under way."""
        with self._lock:
            if self._under_way:
                self._later.append(do)
                return
        do()

    @property
    def queued(self) -> str:
        """The name under which it queues."""
        return f"{self.owner}#{self.number}"

    def heard(self) -> None:
        """A sign of life."""
        self._heard = time.monotonic()

    @property
    def silent_for(self) -> float:
        """How long there has been none."""
        return time.monotonic() - self._heard

    def seat(self, run: int) -> Seat:
        """The run of this number; a sentence where it is gone."""
        seat = self.seats.get(run)
        if seat is None:
            why = self.ended.get(run, "is not known")
            raise RunEndedError(f"Run {run} {why}.", "Open a new trace to run the model again.")
        return seat

    def keep(self, tensor: torch.Tensor) -> int:
        """Keep a tensor that the client has a handle of; the handle's number."""
        number = next(self._refs)
        self.refs[number] = tensor
        return number

    def kept(self, number: int) -> torch.Tensor:
        """What a handle is of."""
        if number not in self.refs:
            raise RemoteError("What this handle is of is not kept any more.", "Read it again; a handle lives with its client.")
        return self.refs[number]

    def lookup(self, model: NNsight, name: tuple[str, Any]) -> Any:
        """What the client has sent a name of: a handle, or the model or a part of it, which is here."""
        kind, which = name
        if kind == "ref":
            return self.kept(which)
        if kind == "module":
            return model._module.get_submodule(which)
        return model[which] if which else model

    def nbytes(self, weights: frozenset[int]) -> int:
        """What the client has here, each piece of memory of its handles once."""
        return nbytes([*self.refs.values()], weights) + sum(seat.bytes for seat in [*self.seats.values()])

    def look(self, weights: frozenset[int]) -> None:
        """See how much each run holds."""
        for seat in [*self.seats.values()]:
            seat.bytes = seat.do(seat.run.nbytes, weights)

    def __repr__(self) -> str:
        return f"<{self.owner}: {len(self.seats)} runs, handles {described([*self.refs.values()])}>"


class Sessions:
    """All clients of a server."""

    def __init__(
        self,
        limits: Limits,
        view: Callable[[], NNsight],
        close: Callable[[Session, int, str], None],
        gone: Callable[[Session], None],
    ) -> None:
        """`view` makes a client's view of the model, `close` ends one of its runs on its lane, `gone` is told who is gone."""
        self.limits = limits
        self._view = view
        self._close = close
        self._gone = gone
        self._numbers = itertools.count(1)
        self._sessions: dict[int, Session] = {}

    def open(self, owner: str, number: int | None = None) -> Session:
        """A new client, of the next number."""
        session = self._made(next(self._numbers) if number is None else number, owner)
        self._sessions[session.number] = session
        return session

    def or_stranger(self, number: int) -> Session:
        """A client; where it has gone, one of its number who has nothing: what rank 0 has begun for it ends everywhere."""
        return self._sessions.get(number) or self._made(number, "somebody who is gone")

    def _made(self, number: int, owner: str) -> Session:
        session = Session(number, owner)
        session.model = self._view()
        return session

    def __getitem__(self, number: int) -> Session:
        session = self._sessions.get(number)
        if session is None:
            raise KeyError(number)
        session.heard()
        return session

    def all(self) -> list[Session]:
        """Those who are connected."""
        return [*self._sessions.values()]

    def close_silent(self, end: Callable[[int], None]) -> None:
        """Close what clients have left who are gone, by `end`, and runs that nobody has touched."""
        for session in self.all():
            if session.silent_for > self.limits.silence:
                end(session.number)
                continue
            for number, seat in [*session.seats.items()]:
                if not seat.busy and time.monotonic() - seat.touched > self.limits.idle:
                    self._close(session, number, f"was closed: nobody had touched it for {self.limits.idle:g} seconds")

    def shut(self, number: int) -> Session | None:
        """The client is going: nothing begins for it any more. `None` where it has been said before."""
        session = self._sessions.get(number)
        if session is None or not session.open:
            return None
        with session._lock:
            session.open = False
        return session

    def end(self, number: int) -> None:
        """The client is gone."""
        session = self._sessions.pop(number, None)
        if session is None:
            return
        session.open = False
        self.clear(session)

    def clear(self, session: Session) -> None:
        """Let go all that a client has who is gone."""
        for run in [*session.seats]:
            self._close(session, run, "was closed: its client has given no sign of life")
        session.refs.clear()
        self._gone(session)
