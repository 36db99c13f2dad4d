"""One time the model reaches a point, seen from the model's own stack.

Everything here may lie on the model's stack while it is paused. So nothing here refers to the run: a run that is left behind
would otherwise keep itself alive.
"""

from functools import partial
from typing import Any, Final, Literal

import torch

from .coroutine import Coroutine, current_stack
from .order import Order
from .taps import Tap, global_forward_hooks, not_compiled

Kind = Literal["input", "output"]
INPUT: Final = "input"
OUTPUT: Final = "output"


class Visit:
    """One call of a tapped module, paused at its input or at its output."""

    value: Any
    __slots__ = ("args", "kind", "kwargs", "module", "outer", "skipped", "value", "versions")

    def __init__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outer: "Visit | None") -> None:
        self.module = module
        self.args = args
        self.kwargs = kwargs
        self.outer = outer
        self.kind: Kind = INPUT
        self.skipped = False
        self.versions = versions(args, kwargs)

    def inputs_unchanged(self) -> bool:
        """Whether the inputs still hold what the module received, told by the tensors' version counters."""
        return self.kind is INPUT or (self.versions is not None and self.versions == versions(self.args, self.kwargs))


class StepEnd:
    """What a run is paused at when a step has ended and somebody still waits for a point in it."""


class Clock:
    """Which step the model is in, kept on its own stack.

    `awaited`: somebody waits for a point of this step, so its end has to be told. `stop_at`: the step before which to pause.
    """

    __slots__ = ("awaited", "inside", "order", "step", "stop_at")

    def __init__(self, order: Order | None) -> None:
        """`order` is what to learn into, or `None`."""
        self.step = 0
        self.awaited = False
        self.stop_at: int | None = None
        self.order = order
        self.inside: list[torch.nn.Module] = []


class Listener(Tap):
    """One run's ear at one module: counts its visits in the step, and pauses where somebody waits."""

    __slots__ = ("clock", "coroutine", "inside", "step", "stop_after", "stop_before", "visits")

    def __init__(self, module: torch.nn.Module, stack: Any, coroutine: Coroutine, clock: Clock) -> None:
        self.module = module
        self.stack = stack
        self.pending = None
        self.coroutine = coroutine
        self.clock = clock
        self.step = self.visits = 0  # how many visits in which step
        self.stop_before = self.stop_after = False
        self.inside: Visit | None = None

    @not_compiled
    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """One call of the module."""
        # The hot path of every read. It is one function since each further call would cost as much as the switch.
        if current_stack() is not self.stack:
            return self.pass_through(args, kwargs)
        clock, module = self.clock, self.module
        if self.step == clock.step:
            self.visits += 1
        else:
            self.step, self.visits = clock.step, 1
        self.inside = visit = Visit(module, args, kwargs, self.inside)
        if clock.order is not None:
            clock.order.note(module, clock.inside, clock.step, self.visits)
            clock.inside.append(module)
        try:
            if self.stop_before or clock.stop_at is not None:
                self._entered(visit)
            value = visit.value if visit.skipped else self.__wrapped__(*visit.args, **visit.kwargs)
        except BaseException:
            self._over(visit)
            raise
        if (module._forward_hooks or global_forward_hooks) and self.after_hooks(partial(self._leave, visit)):
            return value
        return self._leave(visit, value)

    def _entered(self, visit: Visit) -> None:
        """The module has been called, and somebody may wait for that."""
        if self.stop_before:
            self.coroutine.pause(visit)

    def _leave(self, visit: Visit, value: Any) -> Any:
        """The forward has returned, or was left out; what is returned here is what the caller gets."""
        visit.value, visit.kind = value, OUTPUT
        if self.stop_after:
            self.coroutine.pause(visit)
            value = visit.value
        self._over(visit)
        return value

    def _over(self, visit: Visit) -> None:
        """The call is over."""
        self.inside = visit.outer
        if self.clock.order is not None:
            self.clock.inside.pop()


class RootListener(Listener):
    """The ear at the root, whose forward passes are the steps."""

    __slots__ = ()

    def _entered(self, visit: Visit) -> None:
        """A step's forward pass begins."""
        if self.stop_before or (self.clock.stop_at == self.clock.step and visit.outer is None):
            self.coroutine.pause(visit)

    def _leave(self, visit: Visit, value: Any) -> Any:
        """A step's forward pass has ended; whoever still waits for a point in it is told before the next begins."""
        value = Listener._leave(self, visit, value)
        if visit.outer is None:
            if self.clock.awaited:
                self.coroutine.pause(StepEnd())
            self.clock.step += 1
        return value


def versions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int | None] | int | None:
    """The version counter of each tensor argument; `None` where one was made under inference mode and has none."""
    try:
        if len(args) == 1 and not kwargs and type(args[0]) is torch.Tensor:
            return args[0]._version
        return [value._version for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    except RuntimeError:
        return None
