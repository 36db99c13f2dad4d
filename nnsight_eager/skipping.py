"""Leave out the body of a `with` block that stands in a running frame.

    skipping = Skipping(frame)      # in `__enter__`
    ...
    skipping.end(error)             # in `__exit__`: whether the block is left because of this; the frame is traced as before

The frame's next instruction raises. It pops what was entered, or begins to store it in the `as` target, and is the only one
that is sure to lie in the block and in no `try` of the body's own: a `NOP`, to which `try:` compiles, is in no block at all
(CPython 3.11 to 3.13). The target is therefore stored by whoever skips.
"""

import sys
from types import FrameType, FunctionType, MethodType
from typing import Any


class SkippedBody(BaseException):
    """Leaves a block whose body runs later."""


class Skipping:
    """The trace functions of one frame while the body of its block is being left out."""

    __slots__ = ("_before", "_frame", "_raised")

    def __init__(self, frame: FrameType) -> None:
        """Trace the instructions of the frame, which is inside the block's `__enter__`."""
        self._frame = frame
        self._raised = SkippedBody()
        self._before = sys.gettrace(), frame.f_trace, frame.f_trace_opcodes, frame.f_trace_lines
        frame.f_trace_opcodes, frame.f_trace_lines, frame.f_trace = True, False, self._look
        if not self._asks_frames():
            sys.settrace(_nothing)

    def end(self, error: BaseException | None) -> bool:  # pragma: no cover: it puts back whatever traces
        """Put back whatever traced the frame before; whether `error` is what left the body out."""
        sys.settrace(None)
        tracing, own, opcodes, lines = self._before
        self._frame.f_trace, self._frame.f_trace_opcodes, self._frame.f_trace_lines = own, opcodes, lines
        if tracing is None or self._asks_frames():
            sys.settrace(tracing)
        else:
            # Coverage's counts calls and returns: it has missed the call of `__exit__` and must miss its return.
            self._frame.f_trace, self._frame.f_trace_opcodes = self._go_on, True
            sys.settrace(_nothing)
        self._raised.__traceback__ = None
        return error is self._raised

    def _asks_frames(self) -> bool:
        """Whether a trace function is in force that has each frame's own one called; one written in C need not."""
        return isinstance(self._before[0], (FunctionType, MethodType))

    def _go_on(self, frame: FrameType, event: str, value: Any) -> Any:  # pragma: no cover: a trace function itself
        """Put back what traced the frame when it goes on itself."""
        tracing, own, opcodes, _ = self._before
        frame.f_trace_opcodes = opcodes
        sys.settrace(tracing)
        follower: Any = own or tracing
        return follower if event == "opcode" and not opcodes else follower(frame, event, value)

    def _look(self, _: FrameType, event: str, __: Any) -> Any:  # pragma: no cover: a trace function itself
        if event == "opcode":
            raise self._raised
        self.end(None)  # entering has failed, and no `__exit__` will come
        return self._frame.f_trace


def _nothing(*_: Any) -> None:
    """A trace function is needed for a frame's own one to be called; new frames are not looked at."""
