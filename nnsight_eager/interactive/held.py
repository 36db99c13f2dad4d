"""A run held by hand: it stays paused between prompt lines and cells, and goes on as far as one says.

run = model.trace("The Eiffel Tower is in").start()      # paused before the first module
run.step()                                               # on to the next point
run.to(model.transformer.h[5].mlp)                       # to the output of this module
model.transformer.h[5].mlp.output *= 0                   # points are read and changed as in a `with` block
run.back_to(model.transformer.h[2])                      # on another forward pass: nothing can be run backwards
other = run.fork()                                       # a second run at the same place; its tree is `other.model`
run.finish()
"""

import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import TracebackType
from typing import Any, NoReturn

from ..compat import add_save_to_builtins
from ..current import held, hold
from ..errors import NotReachedError, PathError, RunEndedError, RunError
from ..nested import tensors
from ..paths import spelled
from ..run import Call, Run
from ..shown import Shown
from ..trace import Trace
from ..tree import Envoy
from ..visits import FIRST, INPUT, NEXT, OUTPUT, Forward, Kind, Place, Visit, Which
from .display import (
    Edits,
    Locals,
    ModelTree,
    Row,
    Where,
    idle,
    model_frame,
    one_line,
    reached,
    receipt,
    rows_of,
    shown_value,
    stale,
)
from .into import stopping_in_code
from .journal import Random, value_at
from .predicates import Predicate
from .recording import Recording


class HeldRun(Shown, Trace):
    """A run held by hand; begun by `model.trace(...).start()`."""

    __slots__ = ("__weakref__", "_found", "_recording")

    _run: Run

    def __init__(self, trace: Trace, recording: Recording, run: Run) -> None:
        super().__init__(trace._tree, trace._name, trace._call, None)
        self._recording = recording
        self._run = run
        self._found = ""

    @classmethod
    def begun(cls, trace: Trace, keep: bool) -> "HeldRun":
        """What `trace.start()` gives: paused before the first module, and the run that points of the model mean."""
        add_save_to_builtins()
        call, tree = trace._call, trace._tree
        if call is None:
            raise RunError(
                "A run held by hand has one input of its own, and this trace has none.", 'Write `model.trace("...").start()`.'
            )
        recording = Recording(tree.root, call, keep)
        run = recording.run(trace._run_of)
        try:
            run.walk()
        except BaseException:
            run.close()
            raise
        self = cls(trace, recording, run)
        before = hold(run)
        tree.held = weakref.ref(self)
        if before is not None:
            before.close()
            warnings.warn("The run of this model that was held by hand has been closed: another was started.", stacklevel=3)
        return self

    def __enter__(self) -> "HeldRun":
        return self

    def __exit__(  # type: ignore[override]  # it lets every error pass
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Going on

    def step(self, n: int = 1, into_code: bool = False) -> "HeldRun":
        """On to the next point in execution order, `n` times: into the module's children, or on behind it.

        With `into_code` a debugger stops at the model's own next line: `n` and `s` go on in it, `c` to the next point.
        """
        for _ in range(n):
            run = self._going_on()
            with stopping_in_code(run.at) if into_code and run.at is not None else nullcontext():
                at = run.walk()
            if at is None:
                break
        return self._arrived()

    def over(self) -> "HeldRun":
        """On past the module that is about to run, to its output; at an output, on to the next point."""
        at = self._going_on().at
        return self._to_output_of(at) if at is not None and at.kind is INPUT else self.step()

    def out(self) -> "HeldRun":
        """On to the output of the module around this one; from the model itself, to its end."""
        at = self._going_on().at
        around = [going.visit for going in self._recording.journal.going if going.visit is not at]
        if around:
            return self._to_output_of(around[-1])
        if at is not None and at.kind is INPUT:
            return self._to_output_of(at)
        self.finish()
        return self

    def to(self, point: Any, kind: Kind = OUTPUT) -> "HeldRun":
        """On to a point: `run.to(model.transformer.h[5].mlp)`, `run.to("transformer.h.5.mlp", "input")`.

        Raises `OutOfOrderError` where the run has passed it, and stays where it is: `run.back_to` goes back.
        """
        run, envoy = self._going_on(), self._envoy(point, kind)
        run.ask(envoy._module, kind, envoy._path, self._which(envoy, kind))
        return self._arrived()

    def until(self, predicate: Predicate) -> "HeldRun":
        """On to the first visit that has a tensor which satisfies the predicate: `run.until(has_nan)`.

        Looks at what modules are given and at what they give. What it has found is shown; where nothing is found the run goes
        to its end. Ready made are `has_nan`, `has_inf`, `norm_above(limit)` and `shape_is(*shape)`.
        """
        run = self._going_on()
        self._found = f"nothing that the run has come by satisfies `{_name_of(predicate)}`"
        while (visit := run.walk()) is not None:
            found = next((found for tensor in tensors(value_at(visit)) if (found := predicate(tensor))), None)
            if found is not None:
                self._found = found if isinstance(found, str) else f"`{_name_of(predicate)}` is satisfied"
                return self
        found = self._found
        self._arrived()
        self._found = found
        return self

    def finish(self) -> Any:
        """Run to the end; what the model call returns."""
        self._found = ""
        run = self._run
        result = run.result
        run.close()
        return result

    def close(self) -> None:
        """Abandon the run; afterwards the model is as it was."""
        self._run.close()

    def stop(self) -> NoReturn:
        """Raise: there is no block to leave."""
        raise RunError("A run held by hand is in no block that could be left.", "`run.close()` abandons it.")

    @property
    def result(self) -> Any:
        """What the model call returns; the rest of it runs first."""
        return self.finish()

    @result.setter
    def result(self, value: Any) -> None:
        self.finish()
        self._run.result = value

    # Looking

    def where(self) -> Where:
        """Where the run is paused: the module, the model's own source line, its local tensors, the tree with what has run."""
        return Where(self._headline(), self._run.at, model_frame(self._run.at), self._rows())

    def _rows(self, at: str = "") -> list[Row]:
        """The modules at and below a path, with what has run."""
        run, shown = self._run, self._tree.memory.aliases.shown
        return rows_of(self._tree.root, self._recording.journal, run.at, run.step, shown, at)

    def tree(self, envoy: Envoy) -> ModelTree:
        """An envoy and what is in it, with what has run: what a notebook shows of it while the run is held."""
        return ModelTree(self._rows(envoy._own_path))

    def locals(self) -> Locals:
        """The local names of the model's own frame where it is paused, to be read: `run.locals()["hidden_states"]`."""
        return Locals(model_frame(self._run.at))

    @property
    def edits(self) -> Edits:
        """What was changed, with how large each change is relative to the value: a receipt.

        Warned of is a change that changed nothing, one made in place to a tensor from which the model had gone on, and, where
        the run has ended and gradients were recorded, one that nothing returned depends on.
        """
        journal, run = self._recording.journal, self._run
        journal.settle()
        whole = reached(run.result) if run.finished and not run.cut_short else set()
        receipts = [
            receipt(each, run.path_of(each.place.module), bool(whole) and each.node is not None and each.node not in whole)
            for each in journal.changes.values()
        ]
        stales = [
            stale(run.path_of(each.place.module), each.place.kind, each.place.step, each.value)
            for each in journal.stale.values()
        ]
        known = {(each.point, each.step) for each in receipts}
        idles = {(each.point, each.step): idle(each) for each in run.changes if (each.point, each.step) not in known}
        return Edits([*receipts, *idles.values(), *stales])

    def paths(self) -> list[str]:
        """The paths of the model's modules, as `to` and `back_to` take them."""
        shown = self._tree.memory.aliases.shown
        return [shown(path) for path, _ in self._tree.root.named_modules() if path]

    # Time travel

    def back_to(self, point: Any, kind: Kind = OUTPUT) -> "HeldRun":
        """Back to a point that the run has come by: `run.back_to(model.transformer.h[2])`.

        It is another forward pass on the same input, with the same random numbers and the changes that were made before that
        point; the old one is closed. What had completed is not computed again, where nobody can tell.
        """
        envoy = self._envoy(point, kind)
        place = self._recording.journal.last_at(envoy._module, kind)
        if place is None:
            point = spelled(envoy._path, kind)
            raise NotReachedError(
                f"The run has not come by `{point}`, so it cannot go back there.", "`run.to(...)` goes on to it.", asked=point
            )
        return self._replay(place)

    def restart(self) -> "HeldRun":
        """Back to the start, before the first module, with nothing changed."""
        journal = self._recording.journal
        first = journal.first or (None if journal.paused is None else journal.paused.place)
        if first is None:
            raise RunError("The call has come by no module, so there is no place to go back to.")
        return self._replay(first)

    def fork(self) -> "HeldRun":
        """A second run paused at the same place, with the same changes; its tree is `other.model`.

        other = run.fork()
        other.model.transformer.h[5].output *= 0
        run.finish(), other.finish()
        """
        at = self._going_on().at
        if at is None:
            raise RunError("The run is paused between two steps, where it cannot be forked.", "Go on with `run.step()`.")
        return forked(self, self._recording, at)

    def _replay(self, place: Place) -> "HeldRun":
        """Be paused at `place`, on a new forward pass."""
        earlier, before = self._recording, self._run
        earlier.journal.settle()
        recording = earlier.again()
        self._run = run = recording.follow(earlier, self._run_of, place)
        self._recording = recording
        if held(self._tree.root) is before or not before.open:
            hold(run)
        before.close()
        if self._view is not None:
            self._view._tree.bound_to = run
        self._found = ""
        return self

    # Inside

    def _going_on(self) -> Run:
        """The run, which must not have ended."""
        run = self._run
        if not run.open:
            how = "was closed" if run.cut_short else "has come to its end"
            raise RunEndedError(f"This run {how}.", "`run.restart()` begins it again, `run.back_to(...)` goes back to a point.")
        self._found = ""
        return run

    def _arrived(self) -> "HeldRun":
        """The run is paused somewhere else now, or has ended: then the model is as it was."""
        if self._run.finished:
            self.finish()
        return self

    def _to_output_of(self, visit: Visit) -> "HeldRun":
        run = self._run
        run.ask(visit.module, OUTPUT, run.path_of(visit.module), NEXT)
        return self._arrived()

    def _which(self, envoy: Envoy, kind: Kind) -> Which:
        """Which visit `to` means: the first in this step; behind that, in a generation, the next."""
        journal, run = self._recording.journal, self._run
        last = journal.last.get((id(envoy._module), INPUT))
        if last is None or last.step != run.step:
            return FIRST if last is None or not self._has_steps else NEXT
        going = any(each.visit.module is envoy._module and each.visit.kind is INPUT for each in journal.going)
        return NEXT if self._has_steps or (going and kind is OUTPUT) else FIRST

    @property
    def _has_steps(self) -> bool:
        """Whether the call may run the model several times."""
        return self._call is not None and self._call.function is not self._tree.root

    def _envoy(self, point: Any, kind: Kind) -> Envoy:
        """The one module that `point` names."""
        if kind not in (INPUT, OUTPUT):
            raise RunError(f"A module has no {kind!r} to go to.", 'Write "input" or "output".')
        if isinstance(point, Envoy):
            return point
        chosen = Envoy(self._tree.root, "", self._tree)._chosen(
            point.replace("[", ".").replace("]", "") if isinstance(point, str) else point
        )
        if len(chosen) != 1:
            raise PathError(f"`{point}` names {len(chosen)} modules.", "Name one: `transformer.h.5.mlp`.")
        ((path, module),) = chosen.items()
        return Envoy(module, path, self._tree)

    def _headline(self) -> str:
        at, run = self._run.at, self._run
        if at is None:
            state = "closed" if run.cut_short else "finished" if run.finished or not run.open else "between two steps"
            return f"{self._name} of {type(self._tree.root).__name__}: {state}"
        point = spelled(run.path_of(at.module), at.kind)
        return f"paused at {point} ({type(at.module).__name__}), step {run.step}"

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        at = self._run.at
        value = "" if at is None else one_line(shown_value(at))
        return Group(Text(self._headline(), "bold"), *(Text(f"  {line}") for line in (value, self._found) if line))


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

    def fork(self) -> HeldRun:
        """A second run, held by hand, paused at the same place with the same changes: `other.model` is its tree.

        with model.trace("The Eiffel Tower is in", keep=True) as tracer:
            model.transformer.h[5].output
            other = tracer.fork()
            other.model.transformer.h[5].output *= 0
            ablated = other.finish().logits
        """
        at = self._opened().at
        if self._recording is None or at is None:
            raise RunError("The run is paused at no point, where it could be forked.", "Read a point first.")
        return forked(self, self._recording, at)


def forked(trace: Trace, recording: Recording, at: Visit) -> HeldRun:
    """A run at the place where another is paused."""
    journal, now = recording.journal, Random.now()
    journal.settle()
    again = recording.again()
    run = again.follow(recording, partial(Trace._run_of, trace), at.place)
    changed = journal.changes.get(at.place.key)
    if changed is not None and run.at is not None:
        again.change(run, run.at, changed)
    again.journal.random = now
    now.put()
    return HeldRun(trace, again, run)


def _name_of(predicate: Predicate) -> str:
    return getattr(predicate, "__name__", type(predicate).__name__)
