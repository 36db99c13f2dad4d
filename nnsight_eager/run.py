"""One model call in progress: where it is paused, who asks, who watches.

    run = Run(root, Call(root, (x,), {}), orders)
    visit = run.ask(layer, "output")      # the forward goes on until the layer has its output, and pauses there
    visit.value
    run.finish()                          # the forward ends; the model is as it was

The run is the caller's side; `visits` is the model's. A run is what every point, loop and watcher stands on.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable
from types import CodeType, FrameType
from typing import Any, NamedTuple, NoReturn

import torch

from .coroutine import OUR_FOLDER, Coroutine
from .errors import EditError, NotReachedError, OutOfOrderError, RunEndedError
from .nested import described
from .order import Order
from .paths import innermost_module, modules_above, path_in, spelled
from .taps import put_in, take_out
from .visits import INPUT, OUTPUT, Clock, Kind, Listener, RootListener, Visit


class Call(NamedTuple):
    """What a run runs; `name` tells calls apart that run different modules (`forward`, `generate`)."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Edit(NamedTuple):
    """A replaced value: the point, the step, before and after, and where the user wrote it."""

    point: str
    step: int
    before: str
    after: str
    code: CodeType
    line: int

    def __str__(self) -> str:
        return (
            f"`{self.point}` in step {self.step}: {self.before} became {self.after} ({self.code.co_filename}, line {self.line})"
        )


class Run:
    """One model call in progress."""

    __slots__ = (
        "__weakref__", "_around", "_clock", "_coroutine", "_cut_short", "_failed_with", "_listeners", "_name", "_order",
        "_orders", "_skipped", "_stack", "_step_over", "at", "edits", "open", "root",
    )  # fmt: skip

    def __init__(self, root: torch.nn.Module, call: Call, orders: dict[str, Order]) -> None:
        """Nothing runs yet. `orders` is what earlier runs of this model have learned, by name of the call."""
        self.root = root
        self.at: Visit | None = None
        self.open = True
        self.edits: list[Edit] = []
        self._failed_with = ""
        self._step_over = self._cut_short = False
        self._skipped: list[torch.nn.Module] = []
        self._name, self._orders = call.name, orders
        known = orders.get(call.name)
        self._order = known or Order()
        self._coroutine = Coroutine(call.function, *call.args, **call.kwargs)
        self._stack = self._coroutine.stack
        self._around = self._order.around
        self._clock = Clock(self._order if known is None else None)
        self._listeners: dict[int, Listener] = {}
        try:
            for module in root.modules() if known is None else known.repeated:
                self._listen(module)
            if call.function is not root:
                self._listener(root)  # the call may run several steps, or none
        except BaseException:
            self.close()
            raise

    # Asking

    def ask(self, module: torch.nn.Module, kind: Kind, path: str) -> Visit:
        """Run on to the module's first visit in this step and pause there; `path` is how the user wrote it."""
        at = self.at
        if at is not None and at.module is module and (at.kind is kind or kind is INPUT):
            return at
        listener = self._listeners.get(id(module)) or self._listener(module)
        if self._step_over or (
            listener.visits
            and listener.step == self._clock.step
            and (listener.inside is None or kind is INPUT or listener.visits > 1)
        ):
            self._missed(module, kind, path, at)
        return self._reach(listener, kind, path, True)

    def ask_next(self, module: torch.nn.Module, kind: Kind, path: str) -> Visit:
        """Run on to the module's next visit, in whatever step, and pause there."""
        return self._reach(self._listener(module), kind, path, False)

    def to_step(self, step: int) -> bool:
        """Run on to the start of `step`; `False` where the model ends before it begins."""
        if self._clock.step < step or self._step_over:
            self._clock.stop_at = step
            while not self.finished and self._clock.step < step:
                self._resume()
            self._clock.stop_at = None
        return not self.finished

    @property
    def step(self) -> int:
        """The step the model is in, counted from 0."""
        return self._clock.step

    def _reach(self, listener: Listener, kind: Kind, path: str, awaited: bool) -> Visit:
        """Resume until the listener's module is visited; an error where the step, or the run, ends before."""
        before = self.at
        if self._coroutine.finished:
            self._missed(listener.module, kind, path, before)
        if kind is OUTPUT:
            listener.stop_after = True
        else:
            listener.stop_before = True
        clock = self._clock
        clock.awaited = awaited
        visit = self._resume()
        listener.stop_after = listener.stop_before = clock.awaited = False
        if visit is None:
            self._missed(listener.module, kind, path, before)
        return visit

    def _resume(self) -> Visit | None:
        """Let the model go on until it pauses at a visit; `None` where a step, or all, has ended."""
        self.at = None
        try:
            paused_at = self._coroutine.resume()
        except BaseException as error:
            self._fail(error)
            raise
        if type(paused_at) is Visit:
            self._step_over, self.at = False, paused_at
            return paused_at
        self._step_over = True
        return None

    # Editing

    def replace(self, visit: Visit, value: Any, path: str) -> None:
        """Have the model go on with `value`, an output or a pair `(args, kwargs)`, at the visit it is paused at."""
        point = spelled(path, visit.kind)
        refuse_in_checkpoint(self._coroutine.frame, point)
        if visit.kind is OUTPUT:
            before, visit.value = visit.value, value
        else:
            before = (visit.args, visit.kwargs)
            visit.args, visit.kwargs = value
        self._record(point, before, value)

    def skip(self, visit: Visit, value: Any, path: str) -> None:
        """Leave out the forward of the module the model is about to enter, and go on with `value` as its output."""
        point = spelled(path, "skip")
        refuse_in_checkpoint(self._coroutine.frame, point)
        visit.skipped, visit.value = True, value
        self._skipped.append(visit.module)
        self._record(point, None, value)

    def _record(self, point: str, before: Any, after: Any) -> None:
        """Keep what was edited and where, for the note on a forward that fails."""
        frame = user_frame()
        self.edits.append(Edit(point, self._clock.step, described(before), described(after), frame.f_code, frame.f_lineno))

    # Ending

    @property
    def finished(self) -> bool:
        """Whether the model call has ended, however."""
        return self._coroutine.finished

    @property
    def result(self) -> Any:
        """What the model call has returned; the rest of it runs first."""
        self.finish()
        return self._coroutine.result

    @result.setter
    def result(self, value: Any) -> None:
        self.finish()
        self._coroutine.result = value

    def finish(self) -> None:
        """Let the model run to its end."""
        if self._failed_with:
            raise RunEndedError(
                f"This run has ended: its forward pass raised `{self._failed_with}`.",
                "Open a new trace to run the model again.",
            )
        if self._cut_short:
            raise RunEndedError(
                "This run was closed before its end, so it has no result.", "Open a new trace to run the model."
            )
        while not self._coroutine.finished:
            self._resume()
        if self._clock.order is not None and not self._skipped:
            self._orders[self._name] = self._order

    def close(self) -> None:
        """End the run wherever it is; afterwards the model is as it was."""
        if not self.open:
            return
        self.open, self.at = False, None
        self._cut_short = not self.finished
        take_out(self._listeners.values())
        self._listeners.clear()
        self._coroutine.close()

    def __del__(self) -> None:
        # A run left behind. At interpreter exit no switch is safe any more, and nothing is left to put back.
        if getattr(self, "open", False) and not sys.is_finalizing():
            with contextlib.suppress(Exception):  # what the model's own `finally` blocks raise has no reader
                self.close()

    # Listening

    def _listener(self, module: torch.nn.Module) -> Listener:
        """The ear at `module`; those around it are put up as well, since their ends can be asked for from inside."""
        listener = self._listeners.get(id(module))
        if listener is None:
            around = self._around.get(id(module))
            if around is None or not self._heard(around):
                for caller in modules_above(self.root, module) if around is None else self._order.living(around):
                    if id(caller) not in self._listeners:
                        self._listen(caller)
            listener = self._listen(module)
        return listener

    def _heard(self, keys: Iterable[int]) -> bool:
        """Whether there is an ear at each of these modules."""
        for key in keys:
            if key not in self._listeners:
                return False
        return True

    def _listen(self, module: torch.nn.Module) -> Listener:
        if not self.open:
            raise RunEndedError("This run has ended.", "Read points inside the `with` block, or open a new trace.")
        kind = RootListener if module is self.root else Listener
        listener = self._listeners[id(module)] = kind(module, self._stack, self._coroutine, self._clock)
        put_in(listener)
        return listener

    # Errors

    def _missed(self, module: torch.nn.Module, kind: Kind, path: str, before: Visit | None) -> NoReturn:
        """Raise what tells why the point is not reached from `before`."""
        if self._failed_with:
            self.finish()
        step = self._clock.step
        if self.finished and step:
            step -= 1  # the clock counts on at the end of a step, and no other has begun
        asked = spelled(path, kind)
        paused_at = spelled(path_in(self.root, before.module), before.kind) if before is not None else ""
        facts = {"asked": asked, "paused_at": paused_at, "step": step}
        skipped = next((s for s in self._skipped if module is not s and any(m is module for m in s.modules())), None)
        if skipped is not None:
            inside = spelled(path_in(self.root, skipped))
            raise NotReachedError(f"`{asked}` does not run in this step: it is inside `{inside}`, which was skipped.",
                "Read it in a trace that does not skip that module.", **facts)  # fmt: skip
        listener = self._listeners[id(module)]
        if (listener.visits and listener.step == step) or (self._clock.order is None and self._order.runs(module, step)):
            where = f"; the model was paused at `{paused_at}`" if paused_at else ""
            above = f" above the line that reads `{paused_at}`" if paused_at else " earlier in the block"
            raise OutOfOrderError(f"`{asked}` has already run in this step (step {step}){where}.",
                f"Read `{asked}`{above}; for a later visit of it write `{spelled(path)}.next().{kind}`.", **facts)  # fmt: skip
        ended = "the model has finished" if self.finished else f"step {step} has ended"
        raise NotReachedError(f"`{asked}` did not run: {ended} without coming by `{spelled(path)}`.",
            "Read a module that this call runs; `print(model)` shows what there is.", **facts)  # fmt: skip

    def _fail(self, error: BaseException) -> None:
        """The forward has raised: note on the error what was running and what had been edited."""
        self._failed_with = type(error).__name__
        if not isinstance(error, Exception):
            return
        module = innermost_module(error, {id(module) for module in self.root.modules()})
        if module is not None:
            error.add_note(f"The model was running `{spelled(path_in(self.root, module))}`.")
        for edit in self.edits:
            error.add_note(f"Edited before: {edit}")


def refuse_in_checkpoint(frame: FrameType | None, point: str) -> None:
    """Raise where the paused forward will be computed again for its gradient, without the edit."""
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            raise EditError(
                f"`{point}` is inside gradient checkpointing: its forward is computed again for the gradient, unedited.",
                "Call `gradient_checkpointing_disable()` on the model first, or edit the checkpointed module as a whole.",
            )
        frame = frame.f_back


def user_frame() -> FrameType:
    """The innermost frame that is not this package's."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(OUR_FOLDER) and frame.f_back is not None:
        frame = frame.f_back
    return frame
