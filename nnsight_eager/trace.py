"""Begin a run, end it whatever happens.

with model.trace("The Eiffel Tower is in the city of") as tracer:
    hidden = model.transformer.h[5].output
tracer.result
"""

from collections.abc import Iterator
from types import TracebackType
from typing import Any, NoReturn

from .compat import add_save_to_builtins
from .current import enter, leave
from .errors import RunEndedError, RunError
from .paths import path_in, spelled
from .run import Call, Run
from .steps import Steps
from .tree import Envoy, Tree


class Stop(BaseException):
    """Leaves the block of the trace it belongs to."""

    def __init__(self, trace: "Trace") -> None:
        super().__init__("tracer.stop() was called outside the block of its trace")
        self.trace = trace


class Trace:
    """One call of the model, begun by `with` and ended when the block is left, however it is left.

    `tracer.model` is the model's tree bound to this run, `tracer.result` what the call returns, `tracer.iter[...]` a loop over
    the steps of a generation, `tracer.stop()` an early end.
    """

    __slots__ = ("_call", "_run", "_tree", "_view")

    def __init__(self, tree: Tree, call: Call) -> None:
        """Nothing runs before the block is entered, or `result` is asked for."""
        self._tree = tree
        self._call = call
        self._run: Run | None = None
        self._view: Envoy | None = None

    def __enter__(self) -> "Trace":
        if self._run is not None and self._run.open:
            raise RunError("This trace is open already.", "Call `model.trace(...)` once more for a second run.")
        add_save_to_builtins()
        self._view = None
        self._run = run = Run(self._tree.root, self._call, self._tree.memory)
        enter(run)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> bool:
        run = self._opened()
        if error is None:
            try:
                run.finish()
            finally:
                leave(run)
                run.close()
            return False
        leave(run)
        try:
            run.close()
        except Exception as closing:
            # The reader's own error comes first; what the model's `finally` blocks raised is noted on it.
            error.add_note(f"While the forward pass was closed it raised {type(closing).__name__}: {closing}")
        return isinstance(error, Stop) and error.trace is self

    @property
    def model(self) -> Envoy:
        """The model's tree bound to this run, for two runs side by side: `b.model.h[3].output = a.model.h[3].output`."""
        if self._view is None:
            self._view = Envoy(self._tree.root, "", Tree(self._tree.root, self._opened(), self._tree.memory))
        return self._view

    @property
    def result(self) -> Any:
        """What the model call returns: inside the block the rest of it runs first; without a block, all of it."""
        if self._run is None:
            with self:
                pass
        return self._opened().result

    @result.setter
    def result(self, value: Any) -> None:
        self._opened().result = value

    @property
    def iter(self) -> Steps:
        """The steps of a generation: `for step in tracer.iter[2:8:2]:`; the loop ends when generation ends."""
        return Steps(self._opened())

    def all(self) -> Iterator[int]:
        """All steps, as `tracer.iter[:]`."""
        return self.iter[:]

    def next(self) -> None:
        """Run on to the next step; what is asked from here on is asked of that step."""
        run = self._opened()
        run.to_step(run.step + 1)

    def stop(self) -> NoReturn:
        """Close the forward pass and leave the block: nothing behind this point is computed."""
        if not self._opened().open:
            raise RunEndedError("This trace has ended already.", "Call `tracer.stop()` inside its `with` block.")
        raise Stop(self)

    def _opened(self) -> Run:
        """The run, which begins when the block is entered."""
        if self._run is None:
            raise RunError(
                "This trace has not begun.", "Write `with model.trace(...) as tracer:` and use `tracer` in the block."
            )
        return self._run

    def __repr__(self) -> str:
        run = self._run
        if run is None:
            state = "not begun"
        elif run.at is not None:
            state = f"paused at {spelled(path_in(run.root, run.at.module), run.at.kind)}, step {run.step}"
        elif not run.open:
            state = "closed" if run.cut_short else "finished"
        else:
            state = "finished" if run.finished else "at the start"
        return f"<{self._call.name} of {type(self._tree.root).__name__}: {state}>"
