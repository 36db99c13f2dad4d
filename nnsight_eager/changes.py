"""What a run has been made to change, and where the user wrote it: for the note on a forward pass that fails.

changes.append(change("model.h[3].output", step=0, before=old, after=new))
print(changes[-1])       # `model.h[3].output` in step 0: [1, 4] float32 became [1, 5] float32 (script.py, line 7)
"""

import sys
from types import CodeType, FrameType
from typing import Any, NamedTuple

from .coroutine import OUR_FOLDER
from .nested import described


class Change(NamedTuple):
    """A replaced value: the point, the step, before and after, and where the user wrote it."""

    point: str
    step: int
    before: str
    after: str
    code: CodeType
    line: int

    def __str__(self) -> str:
        return (
            f"`{self.point}` in step {self.step}: {self.before} became {self.after} ({self.code.co_filename}, line {self.line})"
        )


def change(point: str, step: int, before: Any, after: Any) -> Change:
    """The change that the user's code makes now."""
    frame = user_frame()
    return Change(point, step, described(before), described(after), frame.f_code, frame.f_lineno)


def user_frame(depth: int = 1) -> FrameType:
    """The innermost frame that is not this package's, from `depth` frames below on."""
    frame = sys._getframe(depth)
    while frame.f_code.co_filename.startswith(OUR_FOLDER) and frame.f_back is not None:
        frame = frame.f_back
    return frame
