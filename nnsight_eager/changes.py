"""What a run has been made to change, and where the user wrote it: for the note on a forward pass that fails.

changes.append(change("h.3", "output", step=0, before=old, after=new))
print(changes[-1])       # `model.h[3].output` in step 0: [1, 4] float32 became [1, 5] float32 (script.py, line 7)
"""

import sys
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch

from .coroutine import OUR_FOLDER
from .nested import described
from .paths import spelled

Form = tuple[torch.Size, torch.dtype] | str
"""What a value is like; of a tensor put into words only where somebody reads it, since edits are many and readers few."""


class Change(NamedTuple):
    """A replaced value: where, in which step, what it was like before and after, and where the user wrote it."""

    path: str
    kind: str
    step: int
    was: Form
    became: Form
    code: CodeType
    line: int

    @property
    def point(self) -> str:
        """The point as the user writes it."""
        return spelled(self.path, self.kind)

    @property
    def before(self) -> str:
        """What the value was like, in words."""
        return _in_words(self.was)

    @property
    def after(self) -> str:
        """What it became, in words."""
        return _in_words(self.became)

    def __str__(self) -> str:
        file = _shown(self.code.co_filename)
        return f"`{self.point}` in step {self.step}: {self.before} became {self.after} ({file}, line {self.line})"


def _shown(file: str) -> str:
    """A file as tracebacks show it: of IPython's cells the number, not the name of the file that it makes up for each."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    cell = None if shell is None else shell.compile.format_code_name(file)
    return file if cell is None else " ".join(cell)


def change(path: str, kind: str, step: int, before: Any, after: Any) -> Change:
    """The change that the user's code makes now."""
    frame = user_frame(3)  # below this and who replaces the value
    return Change(path, kind, step, _form(before), _form(after), frame.f_code, frame.f_lineno)


def _form(value: Any) -> Form:
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else described(value)


def _in_words(form: Form) -> str:
    return form if isinstance(form, str) else described(torch.empty(form[0], dtype=form[1], device="meta"))


def user_frame(depth: int = 1) -> FrameType:
    """The innermost frame that is not this package's, from `depth` frames below on."""
    frame = sys._getframe(depth)
    while frame.f_code.co_filename.startswith(OUR_FOLDER) and frame.f_back is not None:
        frame = frame.f_back
    return frame
