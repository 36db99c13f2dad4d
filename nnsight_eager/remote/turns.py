"""Whose turn it is to compute: one at a time, and next is who has computed least.

    turns = Turns()
    with turns.of("alice"):          # waits until nobody computes and nobody who waits has had less
        forward.resume()
    turns.waits("alice")             # how long alice has waited, each time

A run paused at a point has no turn, so that it holds nobody up; a turn lasts from one pause to the next. Who begins anew is
counted as having had as much as whoever was served last: neither is the past held against anybody, nor can it be saved up.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

REMEMBERED: Final = 4096
"""How many waiting times are kept of each owner."""


class Owner:
    """What is known of one owner."""

    __slots__ = ("used", "waiting", "waits")

    def __init__(self) -> None:
        self.used = 0.0  # seconds of computing
        self.waiting: deque[threading.Lock] = deque()
        self.waits: deque[float] = deque(maxlen=REMEMBERED)


class Turns:
    """One device's turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owners: dict[str, Owner] = {}
        self._taken = False
        self._served = 0.0  # how much the owner who was served last had had
        self._mine = threading.local()

    def of(self, owner: str, call: int | None = None) -> "Turn":
        """A turn of this owner, to be entered; within a turn of the same thread it is that one.

        `call` tells what it is for, where several ranks take turns alike; without it what this runs in.
        """
        return Turn(self, owner, call)

    def waits(self, owner: str) -> list[float]:
        """The last waiting times of an owner, in seconds."""
        with self._lock:
            found = self._owners.get(owner)
            return [*found.waits] if found else []

    def owners(self) -> dict[str, tuple[int, float]]:
        """How many of each owner's wait, and how many seconds it has computed."""
        with self._lock:
            return {name: (len(owner.waiting), owner.used) for name, owner in self._owners.items()}

    def forget(self, owner: str) -> None:
        """The owner is gone."""
        with self._lock:
            found = self._owners.get(owner)
            if found is not None and not found.waiting:
                del self._owners[owner]

    def take(self, name: str, call: int | None = None) -> None:
        """Wait for a turn."""
        depth = getattr(self._mine, "depth", 0)
        if not depth:
            self._begin(name, call)
        self._mine.depth = depth + 1

    def give(self, name: str) -> None:
        """The turn is over; the next is who has had least."""
        depth = getattr(self._mine, "depth", 0)
        if depth:  # else it was given before, by a rest that has not come to its end
            self._mine.depth = depth - 1
        if depth == 1:
            self._end(name)

    def rest(self, name: str, meanwhile: Callable[[], None]) -> None:
        """Let others have their turns first, where this thread has a turn for longer; `meanwhile` may raise."""
        if getattr(self._mine, "depth", 0) == 1:
            self.give(name)
            meanwhile()
            self.take(name)

    def _begin(self, name: str, call: int | None) -> None:
        asked = time.perf_counter()
        with self._lock:
            owner = self._owners.setdefault(name, Owner())
            if not owner.waiting:
                owner.used = max(owner.used, self._served)
            gate = None
            if self._taken:
                gate = threading.Lock()
                gate.acquire()
                owner.waiting.append(gate)
            self._taken = True
        if gate is not None:
            gate.acquire()  # opened by whoever gives the turn on
        self._mine.begun = begun = time.perf_counter()
        owner.waits.append(begun - asked)

    def _end(self, name: str) -> None:
        used = time.perf_counter() - self._mine.begun
        with self._lock:
            owner = self._owners.setdefault(name, Owner())
            owner.used += used
            waiting = [each for each in self._owners.values() if each.waiting]
            if not waiting:
                self._taken = False
                return
            following = min(waiting, key=lambda each: each.used)
            self._served = following.used
            following.waiting.popleft().release()


class Turn:
    """One turn, from `with` to its end."""

    __slots__ = ("_call", "_owner", "_turns")

    def __init__(self, turns: Turns, owner: str, call: int | None) -> None:
        self._turns = turns
        self._owner = owner
        self._call = call

    def __enter__(self) -> None:
        self._turns.take(self._owner, self._call)

    def __exit__(self, *_: Any) -> None:
        self._turns.give(self._owner)
