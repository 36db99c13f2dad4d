"""Errors that begin at the user's line, and tell of the model's own code: what only passes a call on is taken out.

@at_the_users_line
def step(self): ...

A traceback then shows the line that asked and, below it, one frame for each forward on the way to what failed, in every
debugger and without any setting. The frame that raised is always there.
"""

from collections.abc import Callable
from functools import wraps
from types import CodeType, TracebackType
from typing import Final, ParamSpec, TypeVar

from .coroutine import without_our_frames

P = ParamSpec("P")
R = TypeVar("R")

CALLERS: Final = (
    "/torch/nn/modules/module.py",
    "/torch/utils/_contextlib.py",
    "/torch/_dynamo/eval_frame.py",
    "/transformers/modeling_layers.py",
    "/transformers/utils/deprecation.py",
    "/transformers/utils/generic.py",
    "/transformers/utils/output_capturing.py",
    "/accelerate/hooks.py",
)
"""Where a module's forward is called and decorated (torch 2.13, transformers 4.57 and 5.24, accelerate 1.10)."""


def passes_on(code: CodeType) -> bool:
    """Whether this code is between a call of a module and the forward that its author has written."""
    return code.co_name != "forward" and code.co_filename.endswith(CALLERS)


def for_the_reader(traceback: TracebackType | None) -> TracebackType | None:
    """The traceback less the frames of this package and those that pass a call on; what has raised stays."""
    first = last = None
    left = without_our_frames(traceback)
    while left is not None:
        following = left.tb_next
        if following is None or not passes_on(left.tb_frame.f_code):
            if last is None:
                first = left
            else:
                last.tb_next = left
            last = left
        left = following
    return first


def at_the_users_line(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose errors have no frame of ours in their traceback, not even its own."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            error.__traceback__ = for_the_reader(error.__traceback__)
            raise  # a bare `raise` adds no entry for this frame (CPython 3.11 to 3.14)

    return called
