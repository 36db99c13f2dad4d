"""Into the model's own code with a debugger: `run.step(into_code=True)`.

    walk_into_code(run, run.at)     # pdb stops at the model's next line; IPython's debugger does, in IPython

`n` and `s` go on line by line, in the model's code only; `c` goes on to the run's next point.
"""

import pdb
import sys
from fnmatch import fnmatch
from types import FrameType
from typing import Any, Final

from ..coroutine import current_stack
from ..run import Run
from ..visits import Visit

SKIPPED: Final = ["nnsight_eager*", "torch.nn.modules.module", "torch._dynamo*", "greenlet*", "contextlib"]
"""The modules whose lines are not the model's own."""


def walk_into_code(run: Run, visit: Visit) -> Visit | None:  # pragma: no cover: a debugger traces here, and nothing else
    """Go on to the next point; a debugger stops at the first line of the model that runs behind `visit`."""
    before, watchers = sys.gettrace(), visit.watchers

    def begin(visit: Visit) -> None:
        # On the model's stack, as the last thing before it goes on.
        visit.watchers = watchers
        of_the_model(debugger())().set_trace(sys._getframe())

    visit.watchers = (*watchers, begin)
    sys.settrace(None)  # another debugger, at whose prompt this may have been typed
    try:
        return sys.call_tracing(run.walk, ())  # at such a prompt nothing is traced otherwise
    finally:
        sys.settrace(before)
        if visit.watchers and visit.watchers[-1] is begin:
            visit.watchers = watchers


def debugger() -> type[pdb.Pdb]:  # pragma: no cover: a debugger traces here, and nothing else
    """IPython's debugger in IPython, else pdb."""
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
        from IPython.core.debugger import Pdb

        return Pdb  # type: ignore[no-any-return]
    return pdb.Pdb


def of_the_model(kind: type[pdb.Pdb]) -> type[pdb.Pdb]:  # pragma: no cover: a debugger traces here, and nothing else
    """A debugger that stops on the stack it was made on, which is the model's, and on no other."""

    class DebuggerOfTheModel(kind):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            super().__init__()
            self._stack = current_stack()

        def trace_dispatch(self, frame: Any, event: str, arg: Any) -> Any:
            """What Python calls for each line: nothing is stopped at while the run is paused."""
            return super().trace_dispatch(frame, event, arg) if current_stack() is self._stack else None

        def stop_here(self, frame: FrameType) -> bool:
            """Whether to stop: as with pdb's own list of modules to skip, of which IPython says each time that it skips one."""
            return not _is_skipped(frame) and bool(super().stop_here(frame))

        def get_stack(self, frame: Any, traceback: Any) -> tuple[list[tuple[FrameType, int]], int]:
            """The frames that `w` shows: the model's own."""
            stack, at = super().get_stack(frame, traceback)
            shown = [each for number, each in enumerate(stack) if number == at or not _is_skipped(each[0])]
            return shown, shown.index(stack[at])

        def parseline(self, line: str) -> Any:
            """`run.where()` is the run's, although pdb has a command of that name."""
            return super().parseline(f"!{line}" if line.lstrip().startswith("run.") else line)

    return DebuggerOfTheModel


def _is_skipped(frame: FrameType) -> bool:  # pragma: no cover: a debugger traces here, and nothing else
    name = frame.f_globals.get("__name__", "")
    return any(fnmatch(name, pattern) for pattern in SKIPPED)
