"""A run on a server, held by hand: it stays paused there between prompt lines and cells.

run = model.trace("The Eiffel Tower is in").start()
run.step().to(model.transformer.h[5])
model.transformer.h[5].output *= 0
other = run.fork()
run.where(), run.finish(), other.finish()
"""

import warnings
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NoReturn

from ..compat import add_save_to_builtins
from ..current import hold
from ..errors import RemoteError, RunError
from ..outline import Row, Seen
from ..paths import spelled
from ..shown import Line, Part, Shown
from ..source import OperationPoint
from ..tracebacks import at_the_users_line
from ..tree import Envoy
from ..visits import OUTPUT, Kind
from .pictures import FarLocals
from .runs import RemoteRun
from .traces import RemoteTrace


class RemoteHeld(Shown, RemoteTrace):
    """A run on a server that is held by hand; begun by `model.trace(...).start()`. Its calls are those of `HeldRun`."""

    __slots__ = ("__weakref__",)

    by_hand = True

    def __init__(self, trace: RemoteTrace, run: RemoteRun) -> None:
        super().__init__(trace._tree, trace._name, trace._call, None, trace._begin_run, trace._root_envoy, trace._submit)
        self._run: Any = run

    @classmethod
    def begun(cls, trace: RemoteTrace, keep: bool) -> "RemoteHeld":
        """What `trace.start()` gives: paused before the first module, and the run that points of the model mean."""
        add_save_to_builtins()
        if trace._call is None:
            raise RunError(
                "A run held by hand has one input of its own, and this trace has none.", 'Write `model.trace("...").start()`.'
            )
        run = trace._begin_run(trace._call, by_hand=keep, retries=trace.retries)
        run.begin_by_hand()
        self = cls(trace, run)
        before = hold(run)  # type: ignore[arg-type]
        trace._tree.held = weakref.ref(self)
        if before is not None:
            before.close()
            warnings.warn("The run of this model that was held by hand has been closed: another was started.", stacklevel=3)
        return self

    def __enter__(self) -> "RemoteHeld":
        return self

    def __exit__(  # it lets every error pass
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @at_the_users_line
    def step(self, n: int = 1) -> "RemoteHeld":
        """On to the next point in execution order, `n` times."""
        return self._led("step", n)

    @at_the_users_line
    def over(self) -> "RemoteHeld":
        """On past the module that is about to run, to its output."""
        return self._led("over")

    @at_the_users_line
    def out(self) -> "RemoteHeld":
        """On to the output of the module around this one."""
        return self._led("out")

    @at_the_users_line
    def to(self, point: Any, kind: Kind = OUTPUT) -> "RemoteHeld":
        """On to a point."""
        return self._led("to", _path(point), kind)

    @at_the_users_line
    def until(self, predicate: Any) -> "RemoteHeld":
        """On to the first visit that has a tensor which satisfies the predicate; it is called on the server."""
        return self._led("until", predicate)

    @at_the_users_line
    def back_to(self, point: Any, kind: Kind = OUTPUT) -> "RemoteHeld":
        """Back to a point that the run has come by."""
        return self._again("back_to", _path(point), kind)

    @at_the_users_line
    def restart(self) -> "RemoteHeld":
        """Back to the start, with nothing changed."""
        return self._again("restart")

    @at_the_users_line
    def fork(self, *_: Any) -> "RemoteHeld":  # type: ignore[override]
        """A second run paused at the same place, with the same changes; its tree is `other.model`."""
        return RemoteHeld(self, self._run.fork())

    @at_the_users_line
    def finish(self) -> Any:
        """Run to the end; what the model call returns."""
        self._run.finish()
        self._run.close()
        return self._run.result

    def close(self) -> None:
        """Abandon the run."""
        self._run.close()

    @at_the_users_line
    def stop(self) -> NoReturn:
        """Raise: there is no block to leave."""
        raise RunError("A run held by hand is in no block that could be left.", "`run.close()` abandons it.")

    @property
    def result(self) -> Any:
        """What the model call returns; the rest of it runs first."""
        return self.finish() if self._run.open else self._run.result

    @result.setter
    def result(self, value: Any) -> None:
        self.finish()
        self._run.result = value

    @property
    def model(self) -> Envoy:
        """The model's tree bound to this run."""
        view = super().model
        view._tree.held = weakref.ref(self)
        return view

    def where(self) -> Any:
        """Where the run is paused, as the server shows it."""
        return self._run.look("look", "where")

    def locals(self) -> Any:
        """The local names of the model's own frame; a value is brought when it is read."""
        found = self._run.look("look", "locals")
        assert isinstance(found, FarLocals)
        found.bring = lambda name: self._run.look("local", name)
        return found

    @property
    def edits(self) -> Any:
        """What was changed, and by how much: a receipt."""
        return self._run.look("look", "edits")

    def paths(self) -> list[str]:
        """The paths of the model's modules."""
        shown = self._tree.memory.aliases.shown
        return [shown(path) for path, _ in self._tree.root.named_modules() if path]

    def _rows(self, at: str = "", brief: bool = False) -> list[Row]:
        """The modules at and below a path, with what has run in this step; asked of the server while the run is open there."""
        if not self._run.open:
            return Seen(self._tree.root, {}, other_name=self._tree.memory.aliases.shown).rows(at, brief)
        return self._run.look("rows", at)  # type: ignore[no-any-return]

    def _led(self, name: str, *args: Any) -> "RemoteHeld":
        self._run.lead(name, *args)
        return self

    def _again(self, name: str, *args: Any) -> "RemoteHeld":
        """Be paused at an earlier place; a run that has ended is open again."""
        self._run.open, self._run.cut_short = True, False
        self._run.lead(name, *args)
        hold(self._run)
        return self

    def _parts(self) -> Iterator[Part]:
        run = self._run
        if run.at is None:
            yield Line(f"{self._name} of {type(self._tree.root).__name__}: {'finished' if run.finished else 'closed'}", "title")
            return
        point = spelled(run.path_of(run.at.module), run.at.kind)
        yield Line(f"paused at {point} ({type(run.at.module).__name__}), step {run.step}", "title")


def _path(point: Any) -> str:
    """How the server is told of a point."""
    if isinstance(point, (Envoy, OperationPoint)):
        return point._path
    if not isinstance(point, str):
        raise RemoteError(f"`{point!r}` names no point.", "Give an envoy or a path.")
    return point
