"""One run's ears at the operations inside a forward: while it has any there, the forward runs rewritten.

An operation is a part of its owner, so that a run asks for it as for any module. The rewritten forward stands below all other
taps of the owner, acts on the run's own stack, and is gone with the run.
"""

from collections.abc import Hashable
from functools import partial
from types import MethodType
from typing import Any, Final, Literal

import torch

from .attention import in_place_of
from .coroutine import current_stack
from .errors import SourceError
from .inside import Part
from .operations import Calls, Dissected, dissected
from .paths import near, spelled
from .peeling import peeled
from .taps import Tap, put_innermost, take_down, tap_at
from .visits import Visit


class OperationPart(Part):
    """An operation in the owner's forward, or, named by several names, in a function that one of those calls."""

    def __init__(
        self, owner: torch.nn.Module, path: str, names: tuple[str, ...], around: torch.nn.Module | None = None
    ) -> None:
        super().__init__(owner, f"{path}.source.{'.source.'.join(names)}" if names else f"{path}.source", around)
        self.names = names
        self._owner_path = path

    def of(self, owner: torch.nn.Module) -> "OperationPart":
        """The operation of these names in another owner's forward."""
        around = self.around.of(owner) if isinstance(self.around, Part) else None
        return OperationPart(owner, self._owner_path, self.names, around)

    @property
    def key(self) -> Hashable:
        """All operations of an owner are heard by one rewritten forward."""
        return id(self.owner)

    def apart(self, stack: Any) -> "Rewritten":
        """The owner's forward, rewritten."""
        tap = tap_at(RewrittenForward(), self.owner)
        tap.calls = RunCalls(self.owner, f"{self._owner_path}.source")
        return Rewritten(tap, stack)


State = Literal[0, 1, 2]
AHEAD: Final = 0
CALLED: Final = 1
OVER: Final = 2
"""How far an operation is that its forward has come by."""


class RunCalls(Calls):
    """What one run has the rewritten code of one function call, in the place of its operations."""

    __slots__ = ("_begun", "_ears", "_heard", "_inside", "_last", "_late", "_owner", "_path")

    def __init__(self, owner: torch.nn.Module, path: str) -> None:
        self._owner = owner
        self._path = path
        self._ears: dict[str, Visit] = {}
        self._inside: dict[str, RunCalls] = {}
        self._heard: set[str] = set()  # where there is an ear, or one inside; the others are to cost little
        self._begun: dict[str, State] | None = None  # what the call in progress has come by
        self._last: dict[str, State] | None = None  # what the last one had come by; `None` where none was heard
        self._late: set[str] = set()  # what it had come by before anyone heard that

    def hear(self, names: tuple[str, ...], ear: Visit) -> None:
        """Have `ear` called for the operation of these names."""
        name, *rest = names
        if not rest:
            if self._begun is not None and name in self._begun:
                self._late.add(name)
            self._ears[name] = ear
        else:
            if name not in self._inside:
                self._inside[name] = RunCalls(self._owner, f"{self._path}.{name}.source")
            self._inside[name].hear(tuple(rest), ear)
        self._heard.add(name)

    def passed(self, names: tuple[str, ...], begun: bool, entering: bool, further: bool) -> bool:
        """Whether it is too late to ask for the operation of these names in the call in progress, if one has `begun`."""
        if self._begun is None:
            return begun
        name, *rest = names
        if rest and name in self._begun:
            return self._inside[name].passed(tuple(rest), self._begun[name] is not AHEAD, entering, further)
        return name in self._late and not further and (entering or self._begun[name] is OVER)

    def came_by(self, names: tuple[str, ...]) -> bool:
        """Whether the last call has come by the operation of these names; it may have, where nobody heard it."""
        name, *rest = names
        if self._last is None or (rest and self._last.get(name)):
            return self._last is None or self._inside[name].came_by(tuple(rest))
        return name in self._last

    def run(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call `function`, whose operations are heard."""
        inner, again = peeled(function)
        found = dissected(inner)
        self._check(found)
        around, self._begun, self._late = self._begun, {}, set()
        try:
            return again(found.calling(inner, self))(*args, **kwargs)
        finally:
            self._last, self._begun = self._begun, around

    def _check(self, found: Dissected) -> None:
        """Refuse an operation that the function does not have: which function is called may be known only now."""
        for name in (*self._ears, *self._inside):
            if name not in found.operations:
                raise no_operation(self._path, name, found)

    def __call__(self, name: str, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """The operation `name`, which is a call of `function`."""
        begun = self._begun
        if begun is None:
            begun = {}
        try:
            if name not in self._heard:
                begun[name] = CALLED
                value = in_place_of(function, self._owner)(*args, **kwargs)
                if name not in self._heard:
                    return value
            else:
                begun[name] = AHEAD
                ear = self._ears.get(name)
                if ear is not None and current_stack() is ear.stack:
                    return _hear(ear, partial(self._call, name, function), args, kwargs)
                value = self._call(name, function, *args, **kwargs)
            ear = self._ears.get(name)
            if ear is None or current_stack() is not ear.stack or ear.stop_before or not ear.stop_after:
                return value
            return _hear(ear, partial(_given, ear, value), args, kwargs)  # somebody has asked for the output from inside
        finally:
            begun[name] = OVER

    def _call(self, name: str, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call what an operation calls: somebody may have asked for what is inside while the model was paused before it."""
        if self._begun is not None:
            self._begun[name] = CALLED
        function = in_place_of(function, self._owner)
        inside = self._inside.get(name)
        if inside is None:
            return function(*args, **kwargs)
        module = module_called(function, self._owner)
        if module is not None:
            raise SourceError(
                f"`{spelled(self._path)}.{name}` calls a module, of type `{type(module).__name__}`.",
                "Read the `.source` of that module; `print(model)` shows where it is.",
            )
        return inside.run(function, *args, **kwargs)

    def assigned(self, name: str, value: Any) -> Any:
        """The operation `name`, which gives a variable its value."""
        if name in self._heard:
            return self(name, _itself, value)
        if self._begun is not None:
            self._begun[name] = OVER
        return value


class RewrittenForward(Tap):
    """Runs a module's forward with its operations called apart."""

    __slots__ = ("calls",)

    calls: RunCalls

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """One call of the module."""
        if current_stack() is not self.stack:
            return self.pass_through(args, kwargs)
        # Below the taps of other runs that ask for operations here, and hear nothing of this one.
        return self.calls.run(self.innermost().__wrapped__, *args, **kwargs)


class Rewritten:
    """A forward that runs rewritten, for one run."""

    def __init__(self, tap: RewrittenForward, stack: Any) -> None:
        self._tap = tap
        self._stack = stack

    def begin(self) -> None:
        """Have the forward run rewritten."""
        put_innermost(self._tap, self._stack)

    def hear(self, part: Part, ear: Visit) -> None:
        """Have `ear` called where the forward comes by the operation."""
        assert isinstance(part, OperationPart)
        if part.names:
            self._tap.calls.hear(part.names, ear)

    def passed(self, part: Part, begun: bool, entering: bool, further: bool) -> bool:
        """Whether the forward in progress has come past the operation, or had begun when nobody heard it."""
        assert isinstance(part, OperationPart)
        return self._tap.calls.passed(part.names, begun, entering, further)

    def came_by(self, part: Part) -> bool:
        """Whether the last call of the forward has come by the operation, or may have, unheard."""
        assert isinstance(part, OperationPart)
        return self._tap.calls.came_by(part.names)

    def end(self) -> None:
        """Have the forward be as it was."""
        take_down([self._tap])


def module_called(function: Any, owner: torch.nn.Module) -> torch.nn.Module | None:
    """The module that a call of `function` runs, which has a source of its own; its `forward` may be called directly.

    The owner's own forward, which a wrapper of it calls, is no other module's.
    """
    if isinstance(function, Tap):
        return function.module
    if isinstance(function, MethodType) and isinstance(function.__self__, torch.nn.Module):
        called = function.__self__
        return called if called is not owner and function.__func__ is type(called).forward else None
    return function if isinstance(function, torch.nn.Module) else None


def _hear(ear: Visit, call: partial[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Have `ear` hear a call."""
    ear.__wrapped__ = call
    try:
        return ear(*args, **kwargs)
    finally:
        ear.__wrapped__ = _itself  # later runs use the ear again, and it may have been a method of a tensor


def _given(ear: Visit, value: Any, /, *args: Any, **kwargs: Any) -> Any:
    """What was called before anyone heard it: whether it has changed its arguments in place is not known any more."""
    ear.versions = None
    return value


def called_at(ear: Visit) -> Any:
    """The function that is about to be called where the model is paused at the input of an operation."""
    return ear.__wrapped__.args[1]  # type: ignore[attr-defined]


def no_operation(path: str, name: str, found: Dissected) -> SourceError:
    """The error for a name that no operation has."""
    return SourceError(
        f"`{spelled(path)}` has no operation `{name}`{near(name, found.operations)}", f"`print({spelled(path)})` lists them."
    )


def _itself(value: Any) -> Any:
    return value
