"""Bodies that are replayed on every run until they are taken away.

    with model.edit() as edited:                          # `edited` is the same model with the edit
        model.transformer.h[5].mlp.output *= 0

    handle = model.edit(function, inplace=True)           # the model itself
    handle.remove()

An edit runs once in every step of every trace and generation, before invokes and before the code of the trace.
"""

import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import torch

from .blocks import Block
from .bodies import Body, check_plain
from .captured import Captured
from .errors import NotReachedError
from .names import Names, alone
from .paths import spelled
from .shared import SharedRun

Given = TypeVar("Given")


class Edit:
    """One stored edit: a handle that takes it away with `remove()`, or at the end of a `with` block."""

    def __init__(self, stored: list["Edit"]) -> None:
        """`stored` are the model's edits, to which it does not belong yet."""
        self.label = "edit"
        self.is_block = False  # made of a `with` block, whose names are those of this process
        self.settings: tuple[Any, ...] = ()
        self._stored = stored
        self._program: Callable[[], Callable[[], Any]] = lambda: _nothing

    def store(
        self, label: str, program: Callable[[], Callable[[], Any]], settings: tuple[Any, ...] = (), *, gives: Given
    ) -> Given:
        """Have every run from here on begin with it; `program` gives what is to be run in a step.

        `settings` are what tells it from another of the same label: numbers, tensors, a program. Returns what it `gives`:
        whoever calls this hands it on as it is, so that Ctrl-C never leaves an edit that nobody can take away.
        """
        self.label, self._program, self.settings = label, program, settings
        try:
            self._stored.append(self)
            return gives
        except BaseException:
            self.remove()
            raise

    def body(self, run: SharedRun) -> Body:
        """The edit as a body of one run: its program in every step."""
        of = weakref.ref(run)  # weakly, so that a run which never begins is freed at once
        body = Body(lambda: self._every_step(of(), body), self.label)
        return body

    def _every_step(self, run: SharedRun | None, body: Body) -> None:
        assert run is not None
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
        if self in self._stored:
            self._stored.remove(self)

    def __enter__(self) -> "Edit":
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<{self.label}>"


class EditBlock(Captured):
    """`with model.edit() as edited:`: the block is kept, and runs from then on."""

    _instead = "Write it as a function: `model.edit(function)`."

    def __init__(self, edit: Edit, entered: Any) -> None:
        """`entered` is what the `as` target gets."""
        self._edit = edit
        self._target = entered

    def __call__(self, function: Callable[[], Any]) -> Any:
        """Have `function`, called without arguments, be the block: `@model.edit(inplace=True)`."""
        return self._edit.store(label_of(function), lambda: function, (function,), gives=self._target)

    def _entered(self) -> Any:  # pragma: no cover: called where nothing is traced until the user's frame goes on
        return self._target

    def _take(  # pragma: no cover: called where nothing is traced until the user's frame goes on
        self, block: Block, frame: FrameType
    ) -> None:
        names = Names(block, frame, alone, "an edit")
        names.leave_frame()
        label = f"edit ({frame.f_code.co_filename}, line {block.code.co_firstlineno})"
        self._edit.is_block = True
        self._edit.store(label, lambda: names.again().run, (names,), gives=None)


def label_of(function: Callable[[], Any]) -> str:
    """How an edit that is a function is called; refused where it cannot be run without arguments."""
    check_plain(function, "edit")
    code = getattr(function, "__code__", None)
    where = f" ({code.co_filename}, line {code.co_firstlineno})" if code is not None else ""
    return f"edit `{getattr(function, '__qualname__', repr(function))}`{where}"


def _nothing() -> None:
    """The program of an edit whose block has not been met."""
