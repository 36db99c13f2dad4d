"""Into the model's own code with a debugger: `run.step(into_code=True)`.

    with stopping_in_code(visit):
        run.walk()              # pdb stops at the model's next line; IPython's debugger does, in IPython

`n` and `s` go on line by line, in the model's code only; `c` goes on to the run's next point.
"""

import pdb
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from ..coroutine import current_stack
from ..visits import Visit

SKIPPED: Final = ["nnsight_eager*", "torch.nn.modules.module", "torch._dynamo*", "greenlet*", "contextlib"]
"""The modules whose lines are not the model's own."""


@contextmanager
def stopping_in_code(visit: Visit) -> Iterator[None]:
    """Have a debugger stop at the first line of the model that runs when it goes on from `visit`."""
    before, watchers = sys.gettrace(), visit.watchers

    def begin(visit: Visit) -> None:
        # On the model's stack, as the last thing before it goes on.
        visit.watchers = watchers
        of_the_model(debugger())(skip=SKIPPED).set_trace(sys._getframe())

    visit.watchers = (*watchers, begin)
    try:
        yield
    finally:
        sys.settrace(before)
        if visit.watchers and visit.watchers[-1] is begin:
            visit.watchers = watchers


def debugger() -> type[pdb.Pdb]:
    """IPython's debugger in IPython, else pdb."""
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
        from IPython.core.debugger import Pdb

        return Pdb  # type: ignore[no-any-return]
    return pdb.Pdb


def of_the_model(kind: type[pdb.Pdb]) -> type[pdb.Pdb]:
    """A debugger that stops on the stack it was made on, which is the model's, and on no other."""

    class DebuggerOfTheModel(kind):  # type: ignore[misc,valid-type]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self._stack = current_stack()

        def trace_dispatch(self, frame: Any, event: str, arg: Any) -> Any:
            """What Python calls for each line: nothing is stopped at while the run is paused."""
            return super().trace_dispatch(frame, event, arg) if current_stack() is self._stack else None

    return DebuggerOfTheModel
