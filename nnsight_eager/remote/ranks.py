"""How the actors that hold one model together keep to one order: rank 0 has the calls, and the others do what it does.

    with ranks.alike("go", session, message):        # rank 0 has every rank do it, and waits for them in the end
        with ranks.turns.of(owner):                  # and has told them whose turn it is
            ...

On every rank the same calls take the same turns at computing. Rank 0 gives a turn to who has computed least, and tells the
others; each of them waits with a call until the turn that it is told of is that call's. So all ranks issue the same
collectives in the same order, however many clients there are. What a client has is taken away when none of its calls is under
way on any rank: what one rank finds, the others find too. The calls and the turns go over Ray, the tensors over torch's process
group. One model on one actor is the case in which nobody has to be told.
"""

import itertools
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..errors import RunEndedError
from .packing import Packed
from .turns import Turns

_call: ContextVar[int] = ContextVar("nnsight_eager_call", default=0)
"""The number of the call that every rank does, in which this runs."""


class Alone:
    """The only actor of a model."""

    answers = True
    """Whether clients are answered here, and their limits watched."""
    several = False
    """Whether there are other ranks."""

    def __init__(self) -> None:
        self.turns = Turns()

    @contextmanager
    def alike(self, method: str, *args: Any) -> Iterator[int]:
        """Have every rank do this; the number of the call, by which its turns are told apart."""
        yield _call.get()

    def take_away(self, when_quiet: Callable[[Callable[[], None]], None], do: Callable[[], None]) -> None:
        """Take something of a client away; `when_quiet` has it done when no call of the client is under way."""
        do()


class First(Alone):
    """Rank 0, which the clients call."""

    several = True

    def __init__(self, others: list[Any], done: Any, end: Any) -> None:
        """`others` are the other ranks' actors, `end` ends this process, and so does `done` where what they do is lost."""
        self.turns = TurnsToTell(self._tell)
        self._others = others
        self._done = done
        self._end = end
        self.broken: Callable[[], bool] = lambda: False
        """Whether the ranks have lost each other, and have to be made anew."""
        self._calls = itertools.count(1)
        self._told = 0

    @contextmanager
    def alike(self, method: str, *args: Any) -> Iterator[int]:
        """Have every rank do this, and wait until they have; within such a call they do it by themselves."""
        if _call.get():
            yield _call.get()
            return
        number = next(self._calls)
        before = _call.set(number)
        args = tuple(map(to_be_sent_on, args))
        doing = [each.follow.remote(number, method, args) for each in self._others]
        try:
            yield number
        finally:
            _call.reset(before)
            for each in self._others:
                each.call_has_ended.remote(number, self._told)
            self._done(doing)
            if self.broken():
                self._end()

    def take_away(self, when_quiet: Callable[[Callable[[], None]], None], do: Callable[[], None]) -> None:
        """Take something of a client away, not before its calls have ended: another rank may not have looked for it yet."""
        when_quiet(do)

    def _tell(self, call: int) -> None:
        self._told += 1
        for each in self._others:
            each.turn_is_of.remote(self._told, call)


class Follower(Alone):
    """Another rank, which does what it is told."""

    answers, several = False, True

    def __init__(self) -> None:
        self.turns: TurnsTold = TurnsTold()

    @contextmanager
    def following(self, call: int) -> Iterator[None]:
        """Do what every rank does under this number."""
        before = _call.set(call)
        try:
            yield
        finally:
            _call.reset(before)
            self.turns.left(call)


class TurnsToTell(Turns):
    """Turns of which others are told as they are given."""

    def __init__(self, tell: Any) -> None:
        super().__init__()
        self._tell = tell

    def _begin(self, name: str, call: int | None) -> None:
        super()._begin(name, call)
        self._tell(_call.get() if call is None else call)


class TurnsTold(Turns):
    """Turns that are taken in the order that rank 0 tells of."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()
        self._order: dict[int, int] = {}  # by the number of a turn the call whose it is
        self._done = 0
        self._ended: dict[int, int] = {}  # the calls that have ended on rank 0, and the number of the last turn until then
        self._left: set[int] = set()  # the calls that have ended here

    def turn_is_of(self, number: int, call: int) -> None:
        """Rank 0 has given this turn to a call."""
        with self._changed:
            self._order[number] = call
            self._skip()

    def call_has_ended(self, call: int, last: int) -> None:
        """A call takes no more turns on rank 0, which has given as many as `last` so far."""
        with self._changed:
            self._ended[call] = last
            self._skip()

    def left(self, call: int) -> None:
        """A call has ended here: turns that rank 0 gives to it still are passed over."""
        with self._changed:
            self._left.add(call)
            self._skip()

    def _begin(self, name: str, call: int | None) -> None:
        mine = _call.get() if call is None else call
        with self._changed:
            self._changed.wait_for(lambda: self._order.get(self._done + 1) == mine or self._is_over(mine))
            if self._order.get(self._done + 1) != mine:
                raise RunEndedError("On rank 0 this call has ended.")

    def _end(self, name: str) -> None:
        with self._changed:
            self._pass()
            self._skip()

    def _is_over(self, call: int) -> bool:
        """Whether rank 0 will give no more turns to a call."""
        return call in self._ended and self._done >= self._ended[call]

    def _skip(self) -> None:
        """Pass over turns that nobody will take, and forget calls that are over."""
        while self._order.get(self._done + 1) in self._left:
            self._pass()
        for call in [each for each in self._left if self._is_over(each)]:
            self._left.discard(call)
            del self._ended[call]
        self._changed.notify_all()

    def _pass(self) -> None:
        self._done += 1
        del self._order[self._done]


def join(rank: int, ranks: int, meeting: str) -> None:
    """Be this rank of a process group, which all of them meet at an address for, or at a file."""
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0"}  # Ray shows each its own device only
    if meeting.startswith("file:"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(init_method=meeting, rank=rank, world_size=ranks)


def to_be_sent_on(value: Any) -> Any:
    """A value that Ray has brought, as it can be sent once more: Ray's own buffers cannot."""
    if isinstance(value, Packed):
        return value._replace(memory=[*map(pickle.PickleBuffer, value.memory)])
    if not isinstance(value, (tuple, list)):
        return value
    made = map(to_be_sent_on, value)
    return value._make(made) if hasattr(value, "_make") else type(value)(made)
