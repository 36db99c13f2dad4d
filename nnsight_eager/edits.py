"""Bodies that are replayed on every run until they are taken away.

    with model.edit() as edited:                          # `edited` is the same model with the edit
        model.transformer.h[5].mlp.output *= 0

    handle = model.edit(function, inplace=True)           # the model itself
    handle.remove()

An edit runs once in every step of every trace and generation, before invokes and before the code of the trace.
"""

import inspect
from collections.abc import Callable
from types import FrameType
from typing import Any

from .blocks import Block
from .bodies import Body
from .captured import Captured
from .errors import InvokeError, NotReachedError
from .names import Names
from .run import Run


class Edit:
    """One stored edit: a handle that takes it away with `remove()`, or at the end of a `with` block."""

    def __init__(self, label: str, program: Callable[[], Callable[[], Any]], remove: Callable[["Edit"], None]) -> None:
        """`program` gives what is to be run in a step."""
        self.label = label
        self._program = program
        self._remove = remove

    def body(self, run: Run) -> Body:
        """The edit as a body of one run: its program in every step."""
        return Body(lambda: self._every_step(run), self.label)

    def _every_step(self, run: Run) -> None:
        step = 0
        while run.to_step(step):
            try:
                self._program()()
            except NotReachedError:
                if not step:
                    raise  # later, a module such as an encoder may not run any more
            step += 1

    def remove(self) -> None:
        """Take the edit away; a run that has begun keeps it."""
        self._remove(self)

    def __enter__(self) -> "Edit":
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<{self.label}>"


class EditBlock(Captured):
    """`with model.edit() as edited:`: the block is kept, and `edited` is the model that runs it."""

    def __init__(self, add: Callable[[str, Callable[[], Callable[[], Any]]], Edit], entered: Any) -> None:
        """`add` stores the edit; `entered` is what the `as` target gets."""
        self._add = add
        self._model = entered

    def _entered(self) -> Any:
        return self._model

    def _take(self, block: Block, frame: FrameType) -> None:
        names = Names(block, frame, _never, "an edit")
        label = f"edit ({frame.f_code.co_filename}, line {block.code.co_firstlineno})"
        self._add(label, lambda: names.again().run)


def label_of(function: Callable[[], Any]) -> str:
    """How an edit that is a function is called; refused where it cannot be run without arguments."""
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):
        raise InvokeError(f"`edit` was given {function!r}.", "Give it a function that takes no arguments.") from None
    code = getattr(function, "__code__", None)
    where = f" ({code.co_filename}, line {code.co_firstlineno})" if code is not None else ""
    return f"edit `{getattr(function, '__qualname__', repr(function))}`{where}"


def _never(ready: Callable[[], bool], waits_for: str) -> None:
    """An edit stands alone: there is no earlier body to wait for."""
