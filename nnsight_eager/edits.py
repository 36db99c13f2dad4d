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

import torch

from .blocks import Block
from .bodies import Body
from .captured import Captured
from .errors import InvokeError, NotReachedError
from .names import Names, alone
from .paths import spelled
from .shared import SharedRun


class Edit:
    """One stored edit: a handle that takes it away with `remove()`, or at the end of a `with` block."""

    def __init__(self, label: str, program: Callable[[], Callable[[], Any]], remove: Callable[["Edit"], None]) -> None:
        """`program` gives what is to be run in a step."""
        self.label = label
        self._program = program
        self._remove = remove

    def body(self, run: SharedRun) -> Body:
        """The edit as a body of one run: its program in every step."""
        body = Body(lambda: self._every_step(run, body), self.label)
        return body

    def _every_step(self, run: SharedRun, body: Body) -> None:
        step, first = 0, list[torch.nn.Module]()
        while run.to_step(step):
            body.asked, body.reached = [], 0
            try:
                self._program()()
            except Exception as error:
                # An edit of an encoder ends after the first step. One of an encoder and a decoder would go on as half an edit.
                ends = isinstance(error, NotReachedError) and step > 0 and bool(body.asked) and not body.reached
                later = run.ran(first, step) if ends else []
                if ends and not later:
                    return
                if later:
                    error.add_note(f"The edit also asks for `{spelled(later[0])}`, which runs in every step: write two edits.")
                error.add_note(f"In {self.label}.")
                raise
            first = first or body.asked
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
        names = Names(block, frame, alone, "an edit")
        names.leave_frame()
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
