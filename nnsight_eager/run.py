"""One model call in progress: where it is paused, who asks, who watches.

    run = Run(root, Call("forward", root, (x,), {}), memory)
    visit = run.ask(layer, "output", "layer")      # the forward goes on until the layer has its output, and pauses there
    visit.value
    run.finish()                          # the forward ends; the model is as it was

The run is the caller's side; `visits` is the model's. A run is what every point, loop and watcher stands on.
"""

import contextlib
import sys
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple, NoReturn

import torch

from .changes import Change, change
from .coroutine import current_stack, inside_forward
from .ears import Ears, Memory, P
from .errors import EditError, RunEndedError
from .inside import Part
from .missed import Miss, why
from .paths import innermost_module, spelled
from .visits import (
    FIRST,
    INPUT,
    NEXT,
    NEXT_IN_STEP,
    OUTPUT,
    Applied,
    Forward,
    Kind,
    Place,
    Visit,
    Watcher,
    Which,
)


class Call(NamedTuple):
    """What a run runs; `name` tells calls apart that run different modules (`forward`, `generate`)."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Stop(BaseException):
    """Leaves the block, or the body, that has asked to stop `run`."""

    def __init__(self, run: "Run") -> None:
        super().__init__("tracer.stop() was called outside the block of its trace")
        self.run = run


class Run:
    """One model call in progress."""

    __slots__ = ("__weakref__", "_beyond", "_ears", "_forward", "_skipped", "_stack", "_step_over", "_whole", "at", "changes",
        "cut_short", "failed_with", "open", "root")  # fmt: skip

    def __init__(self, root: torch.nn.Module, call: Call, memory: Memory, make: Callable[..., Forward] = Forward) -> None:
        """Nothing runs yet. `memory` is what earlier runs of this model have left, `make` makes the coroutine."""
        self.root = root
        self.at: Visit | None = None
        self.open = True
        self.changes: list[Change] = []
        self.failed_with = ""
        self._step_over = self._beyond = self.cut_short = False
        self._whole = True  # all of the call has been run, so that it tells what runs
        self._skipped: list[torch.nn.Module] = []
        self._forward = forward = memory.forward(root, call.name, make)(call.function, *call.args, **call.kwargs)
        self._stack = forward.stack
        self._ears = Ears(root, call.name, forward, memory)
        try:
            self._ears.begin(several_steps=call.function is not root)
        except BaseException:
            self.close()
            raise

    # Asking

    def ask(self, module: torch.nn.Module, kind: Kind, path: str, which: Which = FIRST) -> Visit:
        """Run on to the module's first visit in this step and pause there; `path` is how the user wrote it.

        With another `which`, run on to the next visit after now, in this step or in whatever step.
        """
        at, forward = self.at, self._forward
        if at is not None and at.module is module and not which and (at.kind is kind or kind is INPUT):
            return at
        if at is None and current_stack() is self._stack:
            raise inside_forward()  # before anything is noted: somebody waits for the model, perhaps for the same point
        visit = self._expected(module, kind, path, which)
        if kind is OUTPUT:
            visit.stop_after = True
        else:
            visit.stop_before = True
        forward.awaited = which is not NEXT
        until = self._until(visit) if which is NEXT_IN_STEP else None
        self.at = None
        try:
            self.at = reached = forward.resume()
        except BaseException as error:
            self._stopped(error, at, visit)
            raise
        if reached is not visit:
            self._step_over = reached is None
            visit.stop_after = visit.stop_before = False
            self._missed(visit, kind, path, at, which)
        if until is not None:
            until.stop_after = False
        self._step_over = False
        return reached

    def _until(self, visit: Visit) -> Visit | None:
        """Where there will be no next visit in this step: the output of what an operation is in; else the end of the step."""
        if not isinstance(visit.module, Part):
            return None
        around = self._ears.at(visit.module.around)
        around.stop_after = True
        return around

    def _expected(self, module: torch.nn.Module, kind: Kind, path: str, which: Which) -> Visit:
        """The ear at the module, which the model has still to come by; an error where it will not."""
        at, forward = self.at, self._forward
        visit = self._ears.at(module)
        if visit.is_unusual and isinstance(module, Part):
            self._expect_part(module, visit, kind, path, which)
        if visit.step == forward.step and not which and (not visit.going_on or kind is INPUT or visit.times > 1):
            self._missed(visit, kind, path, at)
        if (
            forward.finished
            or (self._step_over and which is not NEXT)
            or (at is not None and at.skipped and self._ears.is_left_out(module, at.module))
        ):
            self._missed(visit, kind, path, at, which)
        return visit

    def _expect_part(self, part: Part, visit: Visit, kind: Kind, path: str, which: Which) -> None:
        """Raise where the forward that `part` is in will not come by it any more in this step."""
        at, step = self.at, self.step
        owner = self._ears.at(part.owner)
        over = not owner.going_on or owner.kind is OUTPUT
        if current_stack() is self._stack:
            raise inside_forward()
        if owner.going_on and self._ears.of_part(part).passed(part, over or at is not owner, kind is INPUT, bool(which)):
            raise self._miss(kind, path, at).too_late(spelled(self.path_of(part.owner)))
        if owner.step == step and visit.step != step and over and not which:
            self._missed(visit, kind, path, at)

    def to_step(self, step: int) -> bool:
        """Run on to the start of `step`; `False` where the model ends before it begins."""
        forward = self._forward
        if forward.step < step or self._step_over:
            forward.stop_before(step)
            try:
                while not forward.finished and forward.step < step:
                    self._resume()
            finally:
                forward.stop_before(None)
            self._beyond = forward.finished
        return not forward.finished

    def walk(self) -> Visit | None:
        """Run on to the next point of any watched module, and pause there; `None` where the model ends before."""
        forward = self._forward
        forward.walking = True
        try:
            while not forward.finished:
                self.go_on()
                if self.at is not None:
                    break
        finally:
            forward.walking = False
        return self.at

    def go_on(self) -> None:
        """Let the model come to its next pause."""
        self._resume()

    @property
    def step(self) -> int:
        """The step the model is in, counted from 0."""
        return self._forward.step

    def _resume(self) -> None:
        """Let the model go on until it pauses at a visit, or a step, or all, has ended."""
        if current_stack() is self._stack:
            raise inside_forward()
        at, self.at = self.at, None
        self._forward.awaited = False
        try:
            self.at = visit = self._forward.resume()
        except BaseException as error:
            self._stopped(error, at)
            raise
        self._step_over = visit is None

    def runs_on(self, stack: Any) -> bool:
        """Whether `stack` is that of a body of this run; a run without bodies has none."""
        return False

    def path_of(self, module: torch.nn.Module) -> str:
        """Where a module or a part stands, in the names the user has given."""
        return self._ears.path_of(module)

    def part(self, key: Hashable, make: Callable[[], P]) -> P:
        """The part of this key, made where the model has none yet."""
        return self._ears.memory.part(key, make)

    def listen(self, part: Part) -> None:
        """Have the owner of `part` call its parts apart from here on, before any of them is asked for."""
        self._ears.of_part(part)

    def apply(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str) -> Any:
        """Call a module in the forward pass, where it is paused, so that its points are visited; what it returns."""
        applied = self._applied(module, args, kwargs, path)
        while not applied.done:
            self._resume()
        return applied.result()

    def _applied(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str) -> Applied:
        """Have the forward call the module before it goes on from where it is paused."""
        if self.at is None or self._ears.at(module).going_on:
            where = "outside of it" if self.at else "at a point"
            raise EditError(
                f"`{spelled(path)}(..., hook=True)` is a call in the model's forward pass, which is not paused {where}.",
                "Read the point it is applied at first, or leave `hook=True` away to apply it unheard.",
            )
        self._forward.applied = applied = Applied(module, args, kwargs)
        return applied

    def watch(self, module: torch.nn.Module, watcher: Watcher) -> None:
        """From now on have `watcher` see each call of the module, at its input and at its output, without pausing."""
        visit = self._ears.at(module)
        visit.watchers = (*visit.watchers, watcher)

    def watch_all(self, modules: Iterable[torch.nn.Module], watcher: Watcher) -> None:
        """The same of each of these, which are all modules of the model."""
        for visit in self._ears.at_all(modules):
            visit.watchers = (*visit.watchers, watcher)

    def view(self, path: str) -> Callable[[Any, str], Any]:
        """What whoever asks now sees of a value of the module at `path`: all of it."""
        return lambda whole, kind: whole

    def whole(self, whole: Any, part: Any, path: str, kind: str) -> Any:
        """`whole` with `part` in the place of what `view` shows of it."""
        return part

    def given(self, module: torch.nn.Module) -> Any:
        """What the model has gone on with from its last pause at the module's output; `None` where it has not paused there."""
        visit = self._ears.at(module)
        return visit.value if visit is self.at and visit.kind is OUTPUT else visit.gave

    # Editing

    def replace(self, visit: Visit, value: Any, path: str) -> None:
        """Have the model go on with `value`, an output or a pair `(args, kwargs)`, at the visit it is paused at."""
        self._forward.check_edit(lambda: spelled(path, visit.kind))
        if visit.kind is OUTPUT:
            before, visit.value = visit.value, value
        else:
            before = (visit.args, visit.kwargs)
            visit.args, visit.kwargs = value
        self.changes.append(change(path, visit.kind, self.step, before, value))

    def skip(self, visit: Visit, value: Any, path: str) -> None:
        """Leave out the forward of the module the model is about to enter, and go on with `value` as its output."""
        self._forward.check_edit(lambda: spelled(path, "skip"))
        self.leave_out(visit, value)
        self.changes.append(change(path, "skip", self.step, None, value))

    def leave_out(self, visit: Visit, value: Any) -> None:
        """Have the model go on with `value` in place of calling the module it is about to enter."""
        visit.skipped, visit.value = True, value
        self._skipped.append(visit.module)
        self._whole = False

    def pass_over(self, visit: Visit, value: Any, inside: Iterable[Place]) -> bool:
        """Go on with what an earlier forward pass of the same call has made of the module, which came by these places in it.

        `False` where somebody waits for one of them.
        """
        ears = [(self._ears.at(place.module), place) for place in inside]
        if any(ear.stop_before or ear.stop_after for ear, _ in ears):
            return False
        visit.skipped, visit.value = True, value
        self._whole = False
        for ear, place in ears:
            ear.step, ear.times = place.step, place.times
        return True

    # Ending

    @property
    def begun(self) -> bool:
        """Whether the model call has begun."""
        return self._forward.begun

    @property
    def finished(self) -> bool:
        """Whether the model call has ended, however."""
        return self._forward.finished

    @property
    def result(self) -> Any:
        """What the model call has returned; the rest of it runs first."""
        self.finish()
        return self._forward.result

    @result.setter
    def result(self, value: Any) -> None:
        self.finish()
        self._forward.result = value

    def finish(self) -> None:
        """Let the model run to its end."""
        self._refuse_ended()
        while not self._forward.finished:
            self._resume()
        if self._whole:
            self._ears.learned()

    def _refuse_ended(self) -> None:
        """Raise where the run has ended before its end."""
        if self.failed_with:
            raise RunEndedError(f"This run has ended: its forward pass raised `{self.failed_with}`.", self._forward.again)
        if self.cut_short:
            raise RunEndedError("This run was closed before its end, so it has no result.", self._forward.again)

    def close(self) -> None:
        """End the run wherever it is; afterwards the model is as it was."""
        if not self.open:
            return
        self.cut_short = not self._forward.finished
        try:
            self._end()
        except BaseException:  # Ctrl-C on the way, or what a `finally` block of the model raised: the rest has to be done still
            self._end()
            raise
        finally:
            self.open = False

    def _end(self) -> None:
        """Take the ears down and close the forward; done a second time it does only what is left."""
        self.at = None
        self._ears.take_down()
        self._forward.close()
        if self._forward.finished:  # else a frame of it waits on another thread, and uses its ears
            self._ears.put_away(self.cut_short)
        self._ears.forget()

    def __del__(self) -> None:
        # A run left behind. At interpreter exit no switch is safe any more, and nothing is left to put back.
        if getattr(self, "open", False) and not sys.is_finalizing():
            with contextlib.suppress(Exception):  # what the model's own `finally` blocks raise has no reader
                self.close()

    # Errors

    def _missed(self, visit: Visit, kind: Kind, path: str, before: Visit | Place | None, which: Which = FIRST) -> NoReturn:
        """Raise what tells why the point is not reached from `before`."""
        if current_stack() is self._stack:
            raise inside_forward()
        if self.failed_with:
            self.finish()
        miss = self._miss(kind, path, before)
        raise why(miss, visit, which, self._skipped, self._ears, self._beyond)

    def _miss(self, kind: Kind, path: str, before: Visit | Place | None) -> Miss:
        """The facts for an ask that is not answered from `before`."""
        step = self._forward.step
        if self.finished and step and not self._beyond:
            step -= 1  # the count goes on at the end of a step, and no other has begun
        before = before if self.at is before else self._forward.left or before  # the visit has gone on with the run
        paused_at = spelled(self.path_of(before.module), before.kind) if before is not None else ""
        return Miss(path, kind, paused_at, step, self.finished, self._forward.by_hand)

    def _stopped(self, error: BaseException, at: Visit | None, awaited: Visit | None = None) -> None:
        """The forward has raised, or would not go on: note on the error what was running and what had been edited."""
        if awaited is not None:
            awaited.stop_after = awaited.stop_before = False
        if not self.finished:
            self.at = at  # a refusal: the run is where it was
            return
        self.failed_with = type(error).__name__
        if not isinstance(error, Exception):
            return
        module = innermost_module(error, {id(module) for module in self.root.modules()})
        if module is not None:
            error.add_note(f"The model was running `{spelled(self.path_of(module))}`.")
        for each in self.changes:
            error.add_note(f"Edited before: {each}")
        if self._forward.by_hand:
            self.close()  # no block is left that would
