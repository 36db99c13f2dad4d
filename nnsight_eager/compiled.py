"""Models that torch compiles run eagerly while they are traced, and say so once.

    model.compile()
    with NNsight(model).trace(x): ...          # the forward as it is written; outside a trace the compiled one

Compiled code does not come by modules one by one. With an ear in it the compiler would break its graph there, and compile
anew for each set of points that is asked for, until it gives up on the model for good.
"""

import sys
import warnings
from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any, Final

import torch

from .changes import user_frame
from .taps import Tap, own_forward, put_aside, put_forth

CALL: Final = "_compiled_call_impl"
"""Where `module.compile()` keeps what `module(...)` calls instead."""

ORIGINAL: Final = "_torchdynamo_orig_callable"
"""Where what `torch.compile` gives keeps what it was given; so does `torch._dynamo.disable`; `functools.wraps` copies it."""


def keep_the_compiler_out() -> None:
    """Have the compiler leave this package alone, where it is at work: in a function that calls modules, or opens a trace.

    Else it would compile what pauses the model. This is called for each run, since nobody is to wait for an import of it.
    """
    rules = sys.modules.get("torch._dynamo.trace_rules")
    if rules is not None and not getattr(rules.__spec__, "_initializing", False):  # another thread may be importing it
        _keep_out()


@cache
def _keep_out() -> None:
    sys.modules["torch._dynamo.trace_rules"].add(__package__)


def written(module: torch.nn.Module) -> Any:
    """The module itself, where it is what `torch.compile(module)` gives: the compiled call around it."""
    return module._orig_mod if type(module).__name__ == "OptimizedModule" else module


def written_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that was given to `torch.compile`, where this is what that gave, not a wrapper with its attributes."""
    if isinstance(function, MethodType):  # which shows the attributes of its function
        inner = written_function(function.__func__)
        return function if inner is function.__func__ else MethodType(inner, function.__self__)
    original = getattr(function, ORIGINAL, function)
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
        as_written = written_function(forward)
        if as_written is not forward:
            tap.innermost().__wrapped__ = as_written  # another run may have a tap between
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
