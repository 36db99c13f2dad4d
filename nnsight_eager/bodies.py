"""Programs that share a run: each goes on until it asks for something that is not there yet.

body = Body(function, 'invoke 1 ("The Eiffel Tower")')
body.resume()                                   # until it waits, or ends
body.ready()                                    # whether what it waits for is there
"""

import inspect
import sys
import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any, Final, NamedTuple, Protocol

import torch

from .batching import Rows
from .coroutine import Coroutine, current_stack, inside_forward
from .errors import InvokeError, RunError
from .paths import spelled
from .signatures import takes
from .visits import FIRST, NEXT, OUTPUT, Applied, Kind, Visit, Which

RUNS_LATER: Final = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
"""The marks of functions that only make something when they are called, and do not run."""


class Awaited(NamedTuple):
    """What a body waits for from the model: its next pause at a visit, the start of a step, or (neither) the end."""

    visit: Visit | None = None
    kind: Kind = "output"
    path: str = ""
    which: Which = FIRST
    step: int | None = None
    until: Visit | None = None
    """Whose output ends the waiting as well."""
    applied: Applied | None = None
    """A call in the forward pass."""

    @property
    def visits(self) -> tuple[Visit | None, ...]:
        """Where it may come; `None` for a step, or the end."""
        return (self.visit,) if self.until is None else (self.visit, self.until)

    def comes_at(self, visit: Visit) -> bool:
        """Whether a pause at `visit`, one of these, is what is waited for."""
        return visit.kind is (self.kind if visit is self.visit else OUTPUT)

    def comes_in(self, step: int) -> bool:
        """Whether a step is waited for, and this is it."""
        return self.step is not None and self.step <= step

    @property
    def in_step(self) -> bool:
        """Whether it can only come in the current step."""
        return self.visit is not None and self.which is not NEXT

    def __str__(self) -> str:
        if self.visit is not None:
            return f"`{spelled(self.path, self.kind)}`"
        if self.applied is not None:
            return f"what `{spelled(self.path)}` returns"
        return "the end of the model" if self.step is None else f"step {self.step}"


class Asker(Protocol):
    """Who asks for points: a body, or the code of a trace beside bodies."""

    label: str
    number: int
    """Its place in the order at one visit."""
    rows: Rows | None
    """Which rows it sees; `None` for all."""
    beyond: bool
    """Whether it has asked for a step that did not come."""
    asked: list[torch.nn.Module] | None
    """What a stored edit has asked for in one step; `None` for anybody else."""
    reached: int
    """How many of these the model has come to."""

    def wait(self, waits_for: Awaited) -> None:
        """Return when the model has come to this, or will not come to it any more."""


class Body(Coroutine):
    """One invoke's program, which runs on a stack of its own until it has to wait."""

    __slots__ = ("_refusal", "asked", "beyond", "label", "number", "reached", "ready", "rows", "waits_for")

    def __init__(self, function: Callable[[], Any], label: str) -> None:
        """It begins with the torch settings in force here, at its first `resume`."""
        super().__init__(function)
        self.label = label
        self.number = 0
        self.beyond = False
        self.asked: list[torch.nn.Module] | None = None
        self.reached = 0
        self.rows: Rows | None = None
        self.ready: Callable[[], bool] | None = _at_once  # `None`: whoever runs the model tells
        self.waits_for: Awaited | str = ""
        self._refusal: BaseException | None = None

    @property
    def wants_model(self) -> bool:
        """Whether the body waits for the model to go on."""
        return isinstance(self.waits_for, Awaited)

    def wait_until(self, ready: Callable[[], bool], waits_for: str) -> None:
        """On the body's stack: pause until `ready`; `waits_for` says in words what is waited for."""
        if not ready():
            self.wait(waits_for, ready)

    def wait(self, waits_for: Awaited | str, ready: Callable[[], bool] | None = None) -> None:
        """On the body's stack: pause, and raise what it was refused with meanwhile."""
        if current_stack() is not self.stack:
            raise inside_forward()
        self.ready, self.waits_for = ready, waits_for
        try:
            self.pause(None)
        finally:
            self.ready, self.waits_for = None, ""
        if self._refusal is not None:
            self._refuse()

    def refuse(self, error: BaseException) -> None:
        """Have `error` raised at the line where the body waits, as soon as it is resumed."""
        self._refusal, self.ready = error, _at_once

    def _refuse(self) -> None:
        refusal, self._refusal = self._refusal, None
        assert refusal is not None
        try:
            raise refusal
        finally:
            del refusal


def _at_once() -> bool:
    """What a body waits for that has not begun, or is to be refused."""
    return True


def check_plain(function: Any, given_to: str) -> None:
    """Refuse what cannot be called without arguments, or would not run when it is."""
    if not (callable(function) and _runs_when_called(function)):
        raise InvokeError(f"`{given_to}` was given {function!r} to run.", "Give it a plain function that takes no arguments.")


def _runs_when_called(function: Callable[..., Any]) -> bool:
    """Whether a call without arguments runs it to its end."""
    if isinstance(function, FunctionType) and not function.__dict__:
        later = bool(function.__code__.co_flags & RUNS_LATER)  # what nearly everybody gives, and `inspect` is slow to tell
    else:
        later = any(
            each(function) for each in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
        )
    return not later and takes(function)


class GoesOn(Protocol):
    """What runs the model."""

    def go_on(self) -> None:
        """Let the model come to the next point that somebody waits for, and the bodies that wait there go on."""


class Caller:
    """Who asks in place, beside bodies: to wait, it lets them and the model go on."""

    def __init__(self, run: "GoesOn") -> None:
        """The run is referred to weakly, since it refers to its caller."""
        self.label = "the block"
        self.number = sys.maxsize
        self.rows: Rows | None = None
        self.asked: list[torch.nn.Module] | None = None
        self.reached = 0
        self.beyond = self.arrived = False
        self._run = weakref.ref(run)

    def wait(self, waits_for: Awaited) -> None:
        """Return when the model has come to this, or will not come to it any more."""
        self.arrived = False
        while not self.arrived:
            run = self._run()
            assert run is not None
            run.go_on()


class Barrier:
    """A place where several invokes wait for each other: `barrier = tracer.barrier(2)`, then `barrier()` in two of them."""

    def __init__(self, parties: int, running: Callable[[], Body | None]) -> None:
        """`running` gives the body that calls; `None` where invokes run one after another, and need not wait."""
        if parties < 1:
            raise RunError(f"`tracer.barrier({parties})` waits for nobody.", "Give the number of invokes that call it.")
        self.parties = parties
        self._running = running
        self._waiting: list[Body] = []
        self._met = 0

    def __call__(self) -> None:
        """Wait until as many invokes as the barrier has parties have come here; then it can be used again."""
        body = self._running()
        if body is None:
            return
        meeting = self._met
        self._waiting.append(body)
        try:
            if len(self._waiting) >= self.parties:
                self._waiting, self._met = [], meeting + 1
            words = f"`tracer.barrier({self.parties})`, at which {self.parties} invokes have to meet"
            body.wait_until(lambda: self._met > meeting, words)
        finally:
            if body in self._waiting:  # it was refused, or closed
                self._waiting.remove(body)

    def __repr__(self) -> str:
        return f"tracer.barrier({self.parties}): {len(self._waiting)} waiting"


def say_one_graph(error: Exception) -> None:
    """Where bodies go back through their graph one after another, torch's own error says whose it is."""
    if isinstance(error, RuntimeError) and "backward through the graph a second time" in str(error):
        error.add_note("The invokes of a trace share one graph: give every backward pass but the last `retain_graph=True`.")
