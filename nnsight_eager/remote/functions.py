"""The functions that clients have submitted, next to the model.

    functions = Functions(model, ranks, rows=32)
    functions.run(session, job, sent)           # what the function returns, packed; what it raises is raised
    functions.progress(session, job)            # as the function says itself

A function opens traces of its own, and then those of one client run one after another; or it is the block of a trace that was
given with it, and may share a forward pass with others (`passes`). Either way the model computes in turns.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any

from ..errors import RunEndedError
from ..language import LanguageModel
from ..progress import listening
from ..visits import Forward
from .packing import Packed, packed, unpacked
from .passes import Block, Passes, run_together
from .ranks import Alone
from .served import device_of, store
from .sessions import Session

_job: ContextVar[int | None] = ContextVar("nnsight_eager_job", default=None)
"""The submitted function that this runs in."""
_shared: ContextVar[bool] = ContextVar("nnsight_eager_shared", default=False)
"""Whether that is the block of a trace, in a pass that others may share."""


class QueuedForward(Forward):
    """A model call of a submitted function: it computes in turns, a turn from one pause to the next."""

    __slots__ = ("_turn",)

    def __init__(self, turn: Callable[[], Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(function, *args, **kwargs)
        self._turn = turn

    def resume(self) -> Any:
        """Go on until the next pause, when it is this owner's turn; what is closed is, whoever has gone."""
        if self._closing:
            return super().resume()
        with self._turn():
            return super().resume()


class Functions:
    """The functions that run next to a model, or wait to."""

    def __init__(self, model: LanguageModel, ranks: Alone, rows: int) -> None:
        """`rows` is how many there may be in a forward pass that several functions share."""
        self._model = model
        self._ranks = ranks
        self._turns = ranks.turns
        self._passes = Passes(self._run_pass, rows)
        self._progress: dict[tuple[int, int], tuple[int, int, str]] = {}

    def turn(self, session: Session) -> Any:
        """A turn of this client, unless it is gone or has cancelled what asks."""
        self._refuse(session)
        self._turns.rest(session.queued, partial(self._refuse, session))
        return self._turns.of(session.queued)

    def _in_turns(self, owner: str) -> AbstractContextManager[None]:
        """Have all of a function be in turns where several ranks hold the model: what it reads they put together."""
        return self._turns.of(owner) if self._ranks.several else nullcontext()

    def run(self, session: Session, job: int, sent: Packed) -> Packed:
        """Run a function; what it returns."""
        try:
            asked = self._asked(session, job, sent)
            if asked.inputs is not None:
                return packed(self._passes.do(asked))
            with session.in_order, self._ranks.alike("run_function", session.number, job, sent), self._in_turns(asked.owner):
                return packed(copy_context().run(asked.function))
        finally:
            self._progress.pop((session.number, job), None)

    def run_pass(self, asked: list[tuple[Session, int, Packed]]) -> None:
        """Run functions that fit each other in one forward pass, as rank 0 does."""
        self._run_together([self._asked(*each) for each in asked])

    def _asked(self, session: Session, job: int, sent: Packed) -> Block:
        """A function that was sent."""
        model = self._queued(partial(self.turn, session))
        function, args, kwargs, edits, inputs = unpacked(
            sent, device=device_of(model._module), there=partial(session.lookup, model)
        )
        store(model, edits)
        call = partial(self._called, session, job, inputs is not None, partial(function, model, *args, **kwargs))
        refuse = partial(refuse_cancelled, session, job)
        return Block(call, inputs, edits, session.queued, (session.number, job, sent), refuse)

    def progress(self, session: int, job: int) -> tuple[int, int, str]:
        """How far a function has come: done, of how much, of what."""
        return self._progress.get((session, job), (0, 0, ""))

    def _called(self, session: Session, job: int, shared: bool, function: Callable[[], Any]) -> Any:
        """Call a function, in context variables that are its own."""
        _job.set(job)
        _shared.set(shared)
        self._refuse(session)
        with listening(partial(self._note, session, job)):
            return function()

    def _note(self, session: Session, job: int, done: int, total: int, what: str) -> None:
        if not self._ranks.several:  # else what it reads next is put together by all ranks: it ends at its next turn
            self._refuse(session)
        self._progress[session.number, job] = done, total, what

    def _refuse(self, session: Session) -> None:
        """Raise where what asks is not wanted any more.

        Of several ranks the first decides, and the others are told by the turns that a call is not given any more. The turns of
        a pass are those of all its functions: there it is decided before the pass begins.
        """
        if self._ranks.answers and not (self._ranks.several and _shared.get()):
            refuse_cancelled(session, _job.get())

    def _run_pass(self, blocks: list[Block]) -> None:
        """Run functions that fit each other in one forward pass, but for those that nobody wants any more."""
        wanted = [each for each in blocks if each.is_wanted()]
        if wanted:
            self._run_together(wanted)

    def _run_together(self, blocks: list[Block]) -> None:
        """Run functions in one forward pass, in the turns of the one that has waited longest."""
        owner = blocks[0].owner

        def turn() -> Any:
            self._turns.rest(owner, lambda: None)
            return self._turns.of(owner)

        model = self._queued(turn)
        store(model, blocks[0].edits)
        with self._ranks.alike("run_pass", [each.asked for each in blocks]), self._in_turns(owner):
            run_together(model, blocks)

    def _queued(self, turn: Callable[[], Any]) -> LanguageModel:
        view = self._model._view()
        view._tree.forward = partial(QueuedForward, turn)
        return view  # type: ignore[return-value]


def refuse_cancelled(session: Session, job: int | None) -> None:
    """Raise where the client is gone, or has cancelled the function."""
    if not session.open:
        raise RunEndedError("The client that has submitted this function has given no sign of life.")
    if job in session.cancelled:
        raise RunEndedError("The function was cancelled by its client.")
