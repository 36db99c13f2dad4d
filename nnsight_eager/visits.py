"""One time the model reaches a point, seen from the model's own stack.

Everything here may lie on the model's stack while it is paused. So nothing here refers to the run: a run that is left behind
would otherwise keep itself alive.
"""

import contextlib
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Final, Literal, NamedTuple, Protocol

import torch

from .coroutine import Coroutine, current_stack
from .errors import EditError
from .nested import tensors
from .order import Order
from .taps import Tap, global_forward_hooks
from .torch_state import grad_enabled, top_saved_tensor_hooks

Kind = Literal["input", "output"]
Watcher = Callable[["Visit"], None]
INPUT: Final = "input"
OUTPUT: Final = "output"

CHECKPOINTING: Final = torch.utils.checkpoint.__dict__
"""The names of the code that computes a forward again."""

Which = Literal[0, 1, 2]
FIRST: Final = 0
"""The first visit in the current step, which is what plain asking means: the further ones are true."""
NEXT_IN_STEP: Final = 1
NEXT: Final = 2
"""The next visit after now, in whatever step."""


class Place(NamedTuple):
    """One time before or behind a module's forward, kept while the model goes on: the visit itself goes on with it."""

    module: torch.nn.Module
    kind: Kind
    step: int
    times: int

    @property
    def key(self) -> tuple[int, Kind, int, int]:
        """Tells places apart, also where modules define an equality of their own."""
        return id(self.module), self.kind, self.step, self.times


class Forward(Coroutine):
    """The model call as a coroutine, and which step it is in.

    `awaited`: somebody waits for a point of this step, so its end has to be told. `stop_at`: the step before which to pause.
    `walking`: pause at every point that an ear comes by. `in_doubt`: paused where the forward may be computed again for its
    gradient, without the edits.
    """

    __slots__ = ("applied", "around", "awaited", "differentiable", "in_doubt", "order", "step", "stop_at", "walking",
        "watched")  # fmt: skip

    by_hand = False  # whether it can be gone back in, so that errors say how
    again = "Open a new trace to run the model again."  # what to do where it has ended
    left: Place | None = None  # where it was paused last, known where it is held by hand

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """A run that is to be learned from sets `order`; `around` is then the calls in progress."""
        Coroutine.__init__(self, function, *args, **kwargs)
        self.step = 0
        self.awaited = False
        self.walking = False
        self.watched = False  # an order is learned, or a step is waited for: every call wants a look
        self.stop_at: int | None = None
        self.order: Order | None = None
        self.around: list[torch.nn.Module] = []
        self.differentiable = grad_enabled()
        self.in_doubt = False
        self.applied: Applied | None = None  # a call to be made where the forward is paused, before it goes on

    def learn(self, order: Order) -> None:
        """Note into `order` what is called."""
        self.order, self.watched = order, True

    def stop_before(self, step: int | None) -> None:
        """Pause before this step, or before none."""
        self.stop_at, self.watched = step, step is not None or self.order is not None

    def check_edit(self, point: Callable[[], str]) -> None:
        """Refuse an edit, where it is paused, that a computation of the gradient would not know of."""
        if self.in_doubt:
            refuse_in_checkpoint(self.frame, point)


class Applied:
    """A module that a body applies to something in the model's forward pass, where it is heard, and not on its own stack."""

    __slots__ = ("_args", "_error", "_kwargs", "_module", "_value", "done")

    def __init__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._module, self._args, self._kwargs = module, args, kwargs
        self._value: Any = None
        self._error: Exception | None = None
        self.done = False

    def run(self) -> None:
        """On the model's stack: make the call. What it raises is the body's to handle."""
        try:
            self._value = self._module(*self._args, **self._kwargs)
        except Exception as error:
            self._error = error
        finally:
            self.done = True

    def result(self) -> Any:
        """What the module has returned."""
        if self._error is not None:
            raise self._error
        return self._value


class Between(Protocol):
    """What stands between the model and whoever asks, where they do not see the same values: see `distributed`."""

    @property
    def broken(self) -> bool:
        """Whether the processes that run the model cannot go on together."""

    def ear(self, kind: type["Visit"]) -> type["Visit"]:
        """The ears to be used in the place of this kind."""

    def forward(self, make: Callable[..., Forward]) -> Callable[..., Forward]:
        """What makes the forwards, in the place of `make`."""

    def write(self, extraction: Any, folder: Any) -> None:
        """Make what is missing of an extraction in a folder."""


class Visit(Tap):
    """One run's ear at one module, and the call in progress there: what it was called with, and what it has made.

    It counts the calls in a step, and pauses where somebody waits. One object serves all calls of its module and, used again,
    all runs, so that a read makes no object.
    """

    __slots__ = ("args", "forward", "gave", "going_on", "is_unusual", "kind", "kwargs", "outer", "skipped", "step",
        "stop_after", "stop_before", "times", "value", "versions", "watchers")  # fmt: skip

    forward: Forward  # whose ear this is, while it is put up
    is_unusual: bool  # more has to be done to hear the module than to stand in its `forward`
    step: int  # the step of the last call
    times: int  # how often the module was called in that step
    stop_before: bool
    stop_after: bool
    outer: list[tuple[Any, ...]]  # the calls of the module that are going on around the one that is heard: it may call itself
    going_on: bool  # a call is in progress, and what follows is of it
    kind: Kind
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: Any
    skipped: bool
    value: Any
    gave: Any  # what the model has gone on with from the last pause, kept where it may have a gradient
    watchers: tuple["Watcher", ...]  # what sees the call without pausing, after all who pause

    def rest(self) -> None:
        """Refer to no run and to no call."""
        self.forward = self.value = self.gave = self.versions = self.args = self.kwargs = None  # type: ignore[assignment]
        self.going_on = self.stop_before = self.stop_after = self.skipped = False
        self.step, self.times, self.outer = -1, 0, []
        self.watchers = ()

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """One call of the module."""
        # The hot path of every read: what is looked at and called here costs as much as the switch.
        if current_stack() is not self.stack:
            return self.pass_through(args, kwargs)
        if self.going_on:
            return self._inside_itself(args, kwargs)
        forward = self.forward
        if self.step == forward.step:
            self.times += 1
        else:
            self.step = forward.step
            self.times = 1
        self.going_on = True
        self.kind = INPUT
        self.args = args
        self.kwargs = kwargs
        try:
            self.versions = versions(args, kwargs) if kwargs or len(args) > 1 else args[0]._version
        except (AttributeError, IndexError, RuntimeError):
            self.versions = versions(args, kwargs)
        try:
            if self.stop_before or self.watchers or forward.watched:
                self._enter(forward)
                value = self.value if self.skipped else self.__wrapped__(*self.args, **self.kwargs)
            else:
                value = self.__wrapped__(*args, **kwargs)
        except BaseException:
            self._forget(forward)
            raise
        if (self.own["_forward_hooks"] or global_forward_hooks) and self.after_hooks(self._leave):
            return value
        return self._leave(value)

    def _enter(self, forward: Forward) -> None:
        """The module has been called, and somebody wants to know."""
        if forward.order is not None:
            forward.order.note(self.module, forward.around, forward.step, self.times)
            forward.around.append(self.module)
        if self.stop_before or forward.walking:
            self.stop_before = False
            self._pause(forward, (self.args, self.kwargs))
            self.versions = versions(self.args, self.kwargs)  # an edit at the input is what the module receives
        if self.watchers:
            self.tell_watchers()

    def _leave(self, value: Any) -> Any:
        """The forward has returned, or was left out; what is returned here is what the caller gets."""
        forward = self.forward
        if self.stop_after or forward.walking:
            self.stop_after = False
            self.kind = OUTPUT
            self.value = value
            self._pause(forward, value)
            value = self.value
            if forward.differentiable:
                self.gave = value
        if self.watchers:
            self.kind, self.value = OUTPUT, value
            self.tell_watchers()
        self._forget(forward)
        return value

    def tell_watchers(self) -> None:
        """Have the watchers see the call."""
        for watcher in self.watchers:
            watcher(self)

    def _pause(self, forward: Forward, held: Any) -> None:
        """Pause here; what was changed in place meanwhile is refused where it would not reach the gradient."""
        if top_saved_tensor_hooks(True) is None and (grad_enabled() or not forward.differentiable):
            forward.pause(self)
            while forward.applied is not None:
                self._apply(forward)
            return
        # Checkpointing runs its region without grad, or under hooks that keep its tensors out.
        before = [each._version for each in tensors(held) if not each.is_inference()]
        forward.in_doubt = True
        forward.pause(self)
        while forward.applied is not None:
            self._apply(forward)
        forward.in_doubt = False
        if before != [each._version for each in tensors(held) if not each.is_inference()]:
            refuse_in_checkpoint(sys._getframe(), lambda: f"{type(self.module).__name__}.{self.kind}")

    def _apply(self, forward: Forward) -> None:
        """Make a call that a body has asked for, and be paused here again."""
        applied, forward.applied = forward.applied, None
        assert applied is not None
        applied.run()
        forward.pause(self)

    def _forget(self, forward: Forward) -> None:
        """The call is over; nothing of it is kept."""
        self.going_on = self.skipped = False
        self.args = self.kwargs = self.value = self.versions = None  # type: ignore[assignment]
        if forward.order is not None:
            del forward.around[-1:]  # Ctrl-C may have come before it was put there
        if self.outer:
            self._outer_goes_on()

    def _inside_itself(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of a module whose forward or hook is going on: a visit of its own, after which the outer one goes on."""
        forward = self.forward
        # Who plainly asked for the output asked for the first visit's, which is the outer one.
        awaited = self.stop_after and forward.awaited
        self.outer.append((self.args, self.kwargs, self.versions, self.times, awaited))
        self.stop_after = self.stop_after and not awaited
        self.going_on = False
        return self(*args, **kwargs)

    def _outer_goes_on(self) -> None:
        """The inner call is over, its hooks included."""
        self.args, self.kwargs, self.versions, self.times, awaited = self.outer.pop()
        self.going_on, self.kind = True, INPUT
        self.stop_after = self.stop_after or awaited

    @property
    def place(self) -> Place:
        """Where the model is in this call."""
        return Place(self.module, self.kind, self.step, self.times)

    def part(self, whole: Any, _: str) -> Any:
        """What the one who asks sees of a value of this visit: all of it."""
        return whole

    def begin_change(self) -> None:
        """A new value is about to be built of the one that is here."""

    def local(self) -> contextlib.AbstractContextManager[None]:
        """Have values be what this process holds, where several hold one model: it is the only one here."""
        return contextlib.nullcontext()

    def inputs_unchanged(self) -> bool:
        """Whether the inputs still hold what the module received, told by the tensors' version counters."""
        return self.kind is INPUT or (self.versions is not None and self.versions == versions(self.args, self.kwargs))


class RootVisit(Visit):
    """The ear at the root, whose forward passes are the steps."""

    __slots__ = ()

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """One forward pass: in a generation without gradients, though the code of the trace runs with them."""
        if current_stack() is not self.stack:
            return self.pass_through(args, kwargs)
        forward, before = self.forward, self.forward.differentiable
        forward.differentiable = grad_enabled() or is_in_checkpoint(sys._getframe(1))
        try:
            return Visit.__call__(self, *args, **kwargs)
        finally:
            forward.differentiable = before  # the code around may go on with gradients, in the model's own modules

    def _enter(self, forward: Forward) -> None:
        """A step's forward pass begins."""
        if forward.stop_at == forward.step:
            self.stop_before = True
        Visit._enter(self, forward)

    def _leave(self, value: Any) -> Any:
        """A step's forward pass has ended; whoever still waits for a point in it is told before the next begins."""
        forward = self.forward
        inside_itself = bool(self.outer)
        value = Visit._leave(self, value)
        if not inside_itself:
            if forward.awaited:
                forward.pause(None)  # at no visit
            forward.step += 1
        return value


def refuse_in_checkpoint(frame: FrameType | None, point: Callable[[], str]) -> None:
    """Raise where the forward at `frame` will be computed again for its gradient, without the edit."""
    if is_in_checkpoint(frame):
        raise EditError(
            f"`{point()}` is inside gradient checkpointing: its forward is computed again for the gradient, unedited.",
            "Call `gradient_checkpointing_disable()` on the model first, or edit the checkpointed module as a whole.",
        )


def is_in_checkpoint(frame: FrameType | None) -> bool:
    """Whether what runs at `frame` will be computed again for its gradient."""
    while frame is not None:
        if frame.f_globals is CHECKPOINTING:
            return True
        frame = frame.f_back
    return False


def versions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The version counters of the tensor arguments; `None` where one was made under inference mode and has none."""
    try:
        if len(args) == 1 and not kwargs:
            return args[0]._version
    except (AttributeError, RuntimeError):
        pass
    try:
        return [each._version for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
    except RuntimeError:
        return None
