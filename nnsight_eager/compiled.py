"""Models that torch compiles run eagerly while they are traced, and say so once.

    model.compile()
    with NNsight(model).trace(x): ...          # the forward as it is written; outside a trace the compiled one

Compiled code does not come by modules one by one. With an ear in it the compiler would break its graph there, and compile
anew for each set of points that is asked for, until it gives up on the model for good.
"""

import warnings
from collections.abc import Callable
from typing import Any, Final

import torch

from .changes import user_frame
from .taps import Tap, own_forward, put_aside, put_forth

CALL: Final = "_compiled_call_impl"
"""Where `module.compile()` keeps what `module(...)` calls instead."""


def written(module: torch.nn.Module) -> Any:
    """The module itself, where it is what `torch.compile(module)` gives: the compiled call around it."""
    return module._orig_mod if type(module).__name__ == "OptimizedModule" else module


def written_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that was given to `torch.compile`, where this is what that gave, not a wrapper with its attributes."""
    original = getattr(function, "_torchdynamo_orig_callable", function)
    own = getattr(function, "__wrapped__", None) is original and not getattr(function, "_torchdynamo_disable", False)
    return original if own else function


class Eagerly:
    """The modules that one run has called as they are written."""

    __slots__ = ("_aside",)

    def __init__(self) -> None:
        self._aside: list[torch.nn.Module] = []

    def call(self, tap: Tap) -> bool:
        """Have the module behind the tap be called as it is written, if it is compiled; whether it is."""
        module, forward = tap.module, own_forward(tap.module)
        if written_function(forward) is not forward:
            innermost = tap  # another run may have a tap between
            while isinstance(innermost._original, Tap):
                innermost = innermost._original
            innermost.__wrapped__ = written_function(forward)
            return True
        self._aside.append(module)  # noted first: Ctrl-C may come in between
        if put_aside(module, CALL, self):
            return True
        self._aside.pop()
        return False

    def end(self) -> None:
        """Have compiled modules be called compiled again."""
        while self._aside:
            put_forth(self._aside[-1], CALL, self)
            self._aside.pop()


def tell(name: str) -> None:
    """The notice, at the user's line."""
    frame = user_frame()
    warnings.warn_explicit(
        f"`{name}` is compiled. In a trace it runs eagerly, as it is written; outside of one nothing changes.",
        UserWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
    )
