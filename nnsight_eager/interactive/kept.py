"""A trace that can be forked: `with model.trace(..., keep=True) as tracer:`.

with model.trace("The Eiffel Tower is in", keep=True) as tracer:
    model.transformer.h[5].output
    other = tracer.fork()              # a run held by hand at the same place
"""

from collections.abc import Callable

from ..errors import RunError
from ..run import Call, Run
from ..trace import Trace
from ..tracebacks import at_the_users_line
from ..visits import Forward
from .held import HeldRun, forked
from .recording import Recording


class KeptTrace(Trace):
    """A trace that can be forked: `with model.trace(..., keep=True) as tracer:`."""

    __slots__ = ("_recording",)

    def __init__(self, trace: Trace) -> None:
        """The same call as `trace`, its completed modules' outputs kept."""
        if trace._call is None:
            raise RunError(
                "`keep=True` is for a trace with one input of its own.", "Leave it away, or give the trace an input."
            )
        super().__init__(trace._tree, trace._name, trace._call, None)
        self._recording: Recording | None = None

    def _run_of(self, call: Call, make: Callable[..., Forward] | None = None) -> Run:
        self._recording = Recording(self._tree.root, call, keep=True)
        return self._recording.run(super()._run_of)

    @at_the_users_line
    def fork(self, keep: bool = True) -> HeldRun:
        """A second run, held by hand, paused at the same place with the same changes: `other.model` is its tree.

            with model.trace("The Eiffel Tower is in", keep=True) as tracer:
                model.transformer.h[5].output
                other = tracer.fork()
                other.model.transformer.h[5].output *= 0
                ablated = other.finish().logits

        One that is only run to its end need not keep what its modules give: `tracer.fork(keep=False)`, as in a sweep.
        """
        at = self._opened().at
        if self._recording is None or at is None:
            raise RunError("The run is paused at no point, where it could be forked.", "Read a point first.")
        return forked(self, self._recording, at, keep)
