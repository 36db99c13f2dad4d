"""Which open run a point belongs to.

    enter(run, opening_frames())      # from now on, points read in these frames and on the stack above mean this run
    current(root)                     # the run meant here
    leave(run)

The open run of the root whose opening frame is nearest on the asking stack; else the innermost in this context, so that
threads and asyncio tasks are apart; else the one that is held by hand on this thread. The context alone would be wrong for
generators, which share their caller's.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from functools import partial
from types import FrameType
from typing import Any, Final, Protocol

import torch

from .changes import user_frame
from .coroutine import frames
from .errors import OutsideTraceError, RunEndedError, WrongThreadError
from .run import Run


class Open(Protocol):
    """What points may belong to: a run, or what stands in its place until it begins."""

    root: torch.nn.Module
    open: bool


# A frame told apart by its address and its code: a run that held its frame could be freed only together with it.
Frames = tuple[tuple[int, int], ...]

# The open runs of this context, outermost first, each with the frames that opened it. Weak: a run that is left behind is freed.
_entered: ContextVar[tuple[tuple[weakref.ref[Any], Frames], ...]] = ContextVar("nnsight_eager_runs", default=())
CONTEXTLIB: Final = contextlib.__dict__
"""The globals of the frames that stand between a context manager of the user's and what uses it."""


class _Held(threading.local):
    """The runs held by hand on this thread: the cells of a notebook share no context variables."""

    def __init__(self) -> None:
        self.runs: list[weakref.ref[Run]] = []


_held = _Held()

# The same of all threads, to tell who reads on another one.
_held_anywhere: weakref.WeakSet[Run] = weakref.WeakSet()
_held_anywhere_lock = threading.Lock()


def enter(run: Open, frames: Iterable[FrameType]) -> None:
    """Make `run` the one that points mean in these frames and on the stack above."""
    _enter(run, tuple([(id(frame), id(frame.f_code)) for frame in frames]))


def enter_bodies(run: Open) -> Callable[[], None]:
    """Make `run` the one that points mean on its bodies' stacks, as one that is held or a fork is not yet; what ends that."""
    for reference, _ in _entered.get():
        if reference() is run:
            return _stay
    _enter(run, ())
    return partial(leave, run)


def _stay() -> None:
    """Leave a run entered that was before."""


def _enter(run: Open, by: Frames) -> None:
    entered, entry = _entered.get(), (weakref.ref(run), by)
    _entered.set((*(each for each in entered if each[0]() is not None), entry) if entered else (entry,))


def hold(run: Run) -> Run | None:
    """Have points on this thread mean `run` where no block of a trace is open; the run of the same model held until now."""
    before = held(run.root)
    _held.runs = [each for each in _held.runs if each() not in (None, before)] + [weakref.ref(run)]
    with _held_anywhere_lock:
        _held_anywhere.add(run)
    return before


def _is_held_elsewhere(root: torch.nn.Module) -> bool:
    """Whether another thread holds a run of `root` by hand."""
    with _held_anywhere_lock:
        return any(run.root is root and run.open for run in _held_anywhere)


def held(root: torch.nn.Module) -> Run | None:
    """The open run of `root` that is held by hand on this thread."""
    runs = (reference() for reference in reversed(_held.runs))
    return next((run for run in runs if run is not None and run.root is root and run.open), None)


def leave(run: Open) -> None:
    """Leave by identity: a generator may end in another context than it began in."""
    entered = _entered.get()
    if len(entered) == 1 and entered[0][0]() is run:
        _entered.set(())
    else:
        _entered.set(tuple(entry for entry in entered if entry[0]() not in (run, None)))


def current(root: torch.nn.Module) -> Run:
    """The open run of `root` that a point read here belongs to."""
    entered = _entered.get()
    if len(entered) == 1:
        run: Run | None = entered[0][0]()
        if run is not None and run.root is root and run.open:
            return run
    return _nearest(root)


def _nearest(root: torch.nn.Module) -> Run:
    """Of the open runs of `root`, the one opened by the nearest frame on this stack; of two opened by one frame the later."""
    runs: list[tuple[Run, Frames]] = [
        (run, by) for reference, by in _entered.get() if (run := reference()) is not None and run.root is root and run.open
    ]
    if not runs:
        by_hand = held(root)
        if by_hand is not None:
            return by_hand
        if any(run is not None and run.root is root for run in (each() for each in _held.runs)):
            raise RunEndedError(
                "The run of this model that was held by hand has ended.",
                "`run.restart()` begins it again, `run.back_to(...)` goes back to a point.",
            )
        if _is_held_elsewhere(root):
            raise WrongThreadError(
                "The run of this model that is held by hand is paused on another thread.",
                "Read its points on that thread, or open a trace of its own on this one.",
            )
        raise outside("A point")
    for place in frames() if len(runs) > 1 else ():
        for run, opened_by in reversed(runs):
            if run.runs_on(place) or (isinstance(place, FrameType) and (id(place), id(place.f_code)) in opened_by):
                return run
    return runs[-1][0]


def outside(asked: str) -> OutsideTraceError:
    """The error for a point, as the user writes it, that belongs to no run."""
    return OutsideTraceError(
        f"{asked} was asked for where no trace of this model is open.",
        "Read it inside `with model.trace(...):`, where a value stays an ordinary variable afterwards, or hold a run open: "
        "`run = model.trace(...).start()`.",
        asked=asked.strip("`"),
    )


def opening_frames() -> list[FrameType]:
    """The frames that open a trace here: the user's, and where that is a context manager of the user's, what uses it."""
    frame = user_frame(2)
    found, above = [frame], frame.f_back
    while above is not None and above.f_globals is CONTEXTLIB:
        while above is not None and above.f_globals is CONTEXTLIB:
            above = above.f_back
        if above is not None:
            found.append(above)
            above = above.f_back
    return found
