"""How far a long piece of work has come, on standard error.

with progress("Extracting", total=tokens, done=0, unit="tokens") as advance:
    advance(512)
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Final

PATIENCE: Final = 1.0
"""How many seconds a piece of work may take before anything is shown."""


@contextmanager
def progress(what: str, total: int, done: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Gives what is to be called with each amount done; shown with the time left, where the work is long."""
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
