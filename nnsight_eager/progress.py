"""How far a long piece of work has come: on standard error, or told to whoever listens.

with progress("Extracting", total=tokens, done=0, unit="tokens") as advance:
    advance(512)

report(3, 10, "prompts")            # in a function that was submitted: what its future's `progress` says
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Final

PATIENCE: Final = 1.0
"""How many seconds a piece of work may take before anything is shown."""

Listener = Callable[[int, int, str], None]
"""Is told how much is done, of how much, of what."""

_listener: ContextVar[Listener | None] = ContextVar("nnsight_eager_progress", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Have `listener` told of the work that is done in this block, instead of showing it."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def report(done: int, total: int, what: str = "") -> None:
    """Say how far the function has come that was submitted to run next to a model; anywhere else nothing happens.

    def norms(model, prompts):
        for number, prompt in enumerate(prompts):
            report(number, len(prompts), "prompts")
            ...
    """
    listener = _listener.get()
    if listener is not None:
        listener(done, total, what)


def _telling(listener: Listener, total: int, done: int, unit: str) -> Callable[[int], None]:
    """What tells a listener of each amount done."""

    def advance(amount: int) -> None:
        nonlocal done
        done += amount
        listener(done, total, unit)

    return advance


@contextmanager
def progress(what: str, total: int, done: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Gives what is to be called with each amount done; shown with the time left, where the work is long."""
    listener = _listener.get()
    if listener is not None:
        yield _telling(listener, total, done, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    # In a notebook rich shows its bars with ipywidgets, and warns at every change where they are not installed.
    console = Console(stderr=True, force_jupyter=None if find_spec("ipywidgets") else False)
    count = TextColumn("{task.completed:,.0f} of {task.total:,.0f} " + unit)
    shown = Progress(TextColumn(what), BarColumn(), count, TimeRemainingColumn(), console=console, auto_refresh=False)
    task = shown.add_task(what, total=total, completed=done)
    begun = time.monotonic()

    def advance(amount: int) -> None:
        shown.advance(task, amount)
        if time.monotonic() - begun > PATIENCE:
            shown.start()
            shown.refresh()

    try:
        yield advance
    finally:
        if shown.live.is_started:  # else `stop` would print an empty line
            shown.stop()
