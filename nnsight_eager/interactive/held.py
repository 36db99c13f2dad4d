"""A run held by hand: it stays paused between prompt lines and cells, and goes on as far as one says.

run = model.trace("The Eiffel Tower is in").start()      # paused before the first module
run.step()                                               # on to the next point
run.to(model.transformer.h[5].mlp)                       # to the output of this module
model.transformer.h[5].mlp.output *= 0                   # points are read and changed as in a `with` block
run.back_to(model.transformer.h[2])                      # on another forward pass: nothing can be run backwards
other = run.fork()                                       # a second run at the same place; its tree is `other.model`
run.finish()
"""

import threading
import weakref
from collections.abc import Iterator
from functools import partial
from itertools import chain
from types import TracebackType
from typing import Any, NoReturn

import torch

from ..cache import Cache
from ..compat import add_save_to_builtins
from ..current import held, hold
from ..errors import NotReachedError, RunEndedError, RunError, WrongThreadError
from ..nested import tensors
from ..outline import Row, Seen
from ..paths import spelled
from ..run import Run
from ..shown import Line, Part, Shown
from ..summaries import one_line
from ..trace import Trace
from ..tracebacks import at_the_users_line
from ..tree import Envoy
from ..visits import FIRST, INPUT, NEXT, OUTPUT, Kind, Place, Visit, Which
from .display import Edits, Locals, Where, idle, model_frame, reached, receipt, shown_value, stale
from .journal import HeldForward, value_at
from .left_behind import close_and_say, say
from .pointing import pointed_at
from .predicates import Predicate, name_of
from .random_numbers import random_numbers_as_they_are
from .recording import Recording


class HeldRun(Shown, Trace):
    """A run held by hand; begun by `model.trace(...).start()`."""

    __slots__ = ("__weakref__", "_cached", "_found", "_recording", "_thread")
    by_hand = True
    _run: Run

    def __init__(self, trace: Trace, recording: Recording, run: Run) -> None:
        super().__init__(trace._tree, trace._name, trace._call, None)
        self._recording = recording
        self._run = run
        self._thread = threading.get_ident()
        self._cached = False
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
        run = recording.run(partial(Trace._run_of, trace))  # a trace that keeps has a recording of its own
        try:
            run.walk()
        except BaseException:
            run.close()
            raise
        self = cls(trace, recording, run)
        before = hold(run)
        tree.held = weakref.ref(self)
        if before is not None:
            close_and_say(before, "another was started.")
        return self

    @at_the_users_line
    def start(self, keep: bool = True) -> NoReturn:
        """Raise: it has been started."""
        raise RunError(
            "This run is held by hand already.",
            "`run.restart()` begins it again, `run.fork()` gives a second one at this place.",
        )

    def __enter__(self) -> "HeldRun":
        return self

    def __exit__(  # it lets every error pass
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        run = getattr(self, "_run", None)
        if run is not None:
            close_and_say(run, "nothing refers to it any more. Keep it in a variable to go on with it.")

    def cache(self, *arguments: Any, **options: Any) -> Cache:
        """`Trace.cache`, of what this forward pass comes by from here on: `back_to` and `restart` begin another."""
        cache = super().cache(*arguments, **options)
        self._cached = True
        return cache

    # Going on

    @at_the_users_line
    def step(self, n: int = 1, into_code: bool = False) -> "HeldRun":
        """On to the next point in execution order, `n` times: into the module's children, or on behind it.

        With `into_code` a debugger stops at the model's own next line: `n` and `s` go on in it, `c` to the next point.
        """
        for _ in range(n):
            run = self._going_on()
            if (_walk_into_code(run, run.at) if into_code and run.at is not None else run.walk()) is None:
                break
        return self._arrived()

    @at_the_users_line
    def over(self) -> "HeldRun":
        """On past the module that is about to run, to its output; at an output, on to the next point."""
        at = self._going_on().at
        return self._to_output_of(at) if at is not None and at.kind is INPUT else self.step()

    @at_the_users_line
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

    @at_the_users_line
    def to(self, point: Any, kind: Kind = OUTPUT) -> "HeldRun":
        """On to a point: `run.to(model.transformer.h[5].mlp)`, `run.to("transformer.h.5.mlp", "input")`.

        An attention's pattern is `run.to(attn, "pattern")`, an operation `run.to(attn.source.self_c_proj_0)`.
        Raises `OutOfOrderError` where the run has passed it, and stays where it is: `run.back_to` goes back.
        """
        run = self._going_on()
        module, path, kind = pointed_at(run, self._tree, point, kind)
        run.ask(module, kind, path, self._which(module, kind))
        return self._arrived()

    @at_the_users_line
    def until(self, predicate: Predicate) -> "HeldRun":
        """On to the first visit that has a tensor which satisfies the predicate: `run.until(has_nan)`.

        Looks at what modules are given and at what they give. What it has found is shown; where nothing is found the run goes
        to its end. Ready made are `has_nan`, `has_inf`, `norm_above(limit)` and `shape_is(*shape)`.
        """
        name = name_of(predicate)  # refused before the run goes on
        run = self._going_on()
        self._found = f"nothing that the run has come by satisfies `{name}`"
        while (visit := run.walk()) is not None:
            found = next((found for tensor in tensors(value_at(visit)) if (found := predicate(tensor))), None)
            if found is not None:
                self._found = found if isinstance(found, str) else f"`{name}` is satisfied"
                return self
        found = self._found
        self._arrived()
        self._found = found
        return self

    @at_the_users_line
    def finish(self) -> Any:
        """Run to the end; what the model call returns."""
        self._found = ""
        run = self._here()
        result = run.result
        run.close()
        return result

    def close(self) -> None:
        """Abandon the run; afterwards the model is as it was."""
        self._settle()
        self._run.close()

    @at_the_users_line
    def stop(self) -> NoReturn:
        """Raise: there is no block to leave."""
        raise RunError("A run held by hand is in no block that could be left.", "`run.close()` abandons it.")

    @property
    @at_the_users_line
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
        return Where(self._headline(), self._run.at, model_frame(self._run.at), self._rows(brief=True))

    def _rows(self, at: str = "", brief: bool = False) -> list[Row]:
        """The modules at and below a path, with what has run in this step."""
        states, shapes = self._recording.journal.seen(self._run.at)
        return Seen(self._tree.root, states, shapes, self._tree.memory.aliases.shown).rows(at, brief)

    @property
    def model(self) -> Envoy:
        """The model's tree bound to this run, also where another is held: `other.model.transformer.h[5].output`."""
        view = super().model
        view._tree.held = weakref.ref(self)
        return view

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
        self._settle()
        whole = reached(run.result) if run.finished and not (run.cut_short or run.failed_with) else set()
        receipts = [
            receipt(each, run.path_of(each.place.module), bool(whole) and each.node is not None and each.node not in whole)
            for each in chain.from_iterable(journal.changes.values())
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

    @at_the_users_line
    def back_to(self, point: Any, kind: Kind = OUTPUT) -> "HeldRun":
        """Back to a point that the run has come by: `run.back_to(model.transformer.h[2])`.

        It is another forward pass on the same input, with the same random numbers and the changes that were made before that
        point; the old one is closed. What had completed is not computed again, where nobody can tell.
        """
        module, path, kind = pointed_at(self._run, self._tree, point, kind)
        place = self._recording.journal.last_at(module, kind)
        if place is None:
            point = spelled(path, kind)
            raise NotReachedError(
                f"The run has not come by `{point}`, so it cannot go back there.", "`run.to(...)` goes on to it.", asked=point
            )
        return self._replay(place)

    @at_the_users_line
    def restart(self) -> "HeldRun":
        """Back to the start, before the first module, with nothing changed."""
        journal = self._recording.journal
        first = journal.first or (None if journal.paused is None else journal.paused.place)
        if first is None:
            raise RunError("The call has come by no module, so there is no place to go back to.")
        return self._replay(first)

    @at_the_users_line
    def fork(self, keep: bool = True) -> "HeldRun":
        """A second run paused at the same place, with the same changes; its tree is `other.model`.

        other = run.fork()                   # `keep=False` for one that is only run to its end
        other.model.transformer.h[5].output *= 0
        run.finish(), other.finish()
        """
        at = self._going_on().at
        if at is None:
            raise RunError("The run is paused between two steps, where it cannot be forked.", "Go on with `run.step()`.")
        return forked(self, self._recording, at, keep)

    def _replay(self, place: Place) -> "HeldRun":
        """Be paused at `place`, on a new forward pass."""
        earlier, before = self._recording, self._here()
        self._settle()
        recording = earlier.again()
        self._run = run = recording.follow(earlier, self._run_of, place)
        self._recording = recording
        self._thread = threading.get_ident()
        if self._cached:
            self._cached = False
            say("The cache of this run has what the forward pass that is closed now came by: declare it again for this one.")
        if held(self._tree.root) is before or not before.open:
            hold(run)
        before.close()
        if self._view is not None:
            self._view._tree.bound_to = run
        self._found = ""
        return self

    # Inside

    def _settle(self) -> None:
        """Note what has been changed where the run is paused; where it was closed, its values are gone."""
        if self._run.open:
            self._recording.journal.settle()

    def _here(self) -> Run:
        """The run, unless it is paused on another thread."""
        if self._run.open and self._thread != threading.get_ident():
            raise WrongThreadError(
                "This run is paused on another thread, and a paused forward pass can only go on on its own thread.",
                "Go on with it there, or begin one of its own on this thread: `model.trace(...).start()`.",
            )
        return self._run

    def _going_on(self) -> Run:
        """The run, which must not have ended."""
        run = self._here()
        if not run.open or run.failed_with:
            how = f"has ended: its forward pass raised `{run.failed_with}`" if run.failed_with else "was closed"
            how = how if run.failed_with or run.cut_short else "has come to its end"
            raise RunEndedError(f"This run {how}.", HeldForward.again)
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

    def _which(self, module: torch.nn.Module, kind: Kind) -> Which:
        """Which visit `to` means: the first in this step; behind that, in a generation, the next."""
        journal, run = self._recording.journal, self._run
        last = journal.last.get((id(module), INPUT)) or journal.last.get((id(module), OUTPUT))
        if run.at is not None and run.at.module is module and run.at.kind is OUTPUT:
            last = run.at.place  # of a part nobody may have heard that it began
        if last is None or last.step != run.step:
            return FIRST if last is None or not self._has_steps else NEXT
        going = any(each.visit.module is module and each.visit.kind is INPUT for each in journal.going)
        return NEXT if self._has_steps or (going and kind is OUTPUT) else FIRST

    @property
    def _has_steps(self) -> bool:
        """Whether the call may run the model several times."""
        return self._call is not None and self._call.function is not self._tree.root

    def _headline(self) -> str:
        at, run = self._run.at, self._run
        if at is None:
            state = "closed" if run.cut_short else "finished" if run.finished or not run.open else "between two steps"
            state = f"failed, its forward pass raised {run.failed_with}" if run.failed_with else state
            return f"{self._name} of {type(self._tree.root).__name__}: {state}"
        point = spelled(run.path_of(at.module), at.kind)
        return f"paused at {point} ({type(at.module).__name__}), step {run.step}"

    def _parts(self) -> Iterator[Part]:
        at = self._run.at
        yield Line(self._headline(), "title")
        if at is not None:
            yield Line(f"  {one_line(shown_value(at))}")
        if self._found:
            yield Line(f"  {self._found}")


def _walk_into_code(run: Run, visit: Visit) -> Visit | None:
    from .into import walk_into_code  # with a debugger, which few need

    return walk_into_code(run, visit)


def forked(trace: Trace, recording: Recording, at: Visit, keep: bool) -> HeldRun:
    """A run at the place where another is paused."""
    journal = recording.journal
    journal.settle()
    again, come_next = recording.again(keep), journal.come_next()
    with random_numbers_as_they_are():
        run = again.follow(recording, partial(Trace._run_of, trace), at.place)
        if run.at is not None:
            for changed in journal.changes.get(at.place.key, ()):
                again.change(run, run.at, changed, recording)
    again.journal.go_on_with(come_next)
    return HeldRun(trace, again, run)
