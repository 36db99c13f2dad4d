"""Errors that begin at the user's line: this package's own frames are taken out of the traceback.

@at_the_users_line
def step(self): ...

A traceback then shows the line that asked and, below it, the model's frames, in every debugger and without any setting.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from .coroutine import without_our_frames

P = ParamSpec("P")
R = TypeVar("R")


def at_the_users_line(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose errors have no frame of ours in their traceback, not even its own."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            error.__traceback__ = without_our_frames(error.__traceback__)
            raise  # a bare `raise` adds no entry for this frame (CPython 3.11 to 3.14)

    return called
