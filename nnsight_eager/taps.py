"""Listen before and after a module's forward, and take it away; the only module that changes an `nn.Module`.

    class Doubled(Tap):
        def __call__(self, /, *args, **kwargs):
            if current_stack() is not self.stack:
                return self.pass_through(args, kwargs)
            return 2 * self.__wrapped__(*args, **kwargs)

    put_up(tap := tap_at(Doubled(), module), current_stack())
    take_down([tap])

A tap is a wrapper in `module.__dict__["forward"]`. It acts only for a call on the stack it listens on and passes every
other call through. `Module.__call__` keeps its fast path, which a forward hook would take away. Several runs may tap one
module: each has a tap of its own there, one around the other, and any of them may leave first.
"""

import contextlib
import copy
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, FunctionType, MethodType
from typing import Any, Final, TypeVar

import torch
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from .coroutine import current_stack

T = TypeVar("T", bound="Tap")

ABSENT: Final = object()
# Reentrant, since a collected run takes its taps out, and a collection can start in any line below.
_lock: Final = threading.RLock()
# What runs have put aside, which overlap on several threads, and who has. Empty where no run is open.
_aside: Final[dict[tuple[int, str], tuple[Any, set[object]]]] = {}
global_forward_hooks: Final = torch_module._global_forward_hooks


class Tap:
    """What stands in a module's `forward` while somebody listens on one stack.

    `tap_at` and `put_up` give it its attributes.
    """

    __slots__ = ("__wrapped__", "_original", "module", "own", "pending", "spent", "stack")

    __wrapped__: Callable[..., Any]  # under this name `inspect.signature` finds it: `generate` refuses what it cannot see there
    _original: Any
    module: torch.nn.Module
    own: dict[str, Any]  # the module's `__dict__`: each look-up on a module itself is slow, for it has a `__getattr__`
    pending: list[Callable[[], None]] | None
    spent: bool  # others may still hold it, in front of something: it is not to be put up again
    stack: Any

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """What a subclass hears with."""
        return self.pass_through(args, kwargs)

    def pass_through(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the forward of the module this call is for, unheard; only a tap's `__call__` calls this."""
        tap: Tap = self
        here = current_stack()
        # Not one calling the next: with some hundred runs open, as in tasks, that would be too deep for Python.
        while isinstance(tap._original, Tap) and tap._original.stack is not here:
            tap = tap._original
        forward = tap.__wrapped__
        if tap._original is ABSENT:
            called = _module_called(_torch_frame(sys._getframe(1)))
            # A shallow copy (a `DataParallel` replica) shares this very tap with the module it was copied from.
            if called is not None and called is not self.module and isinstance(called.__dict__.get("forward"), Tap):
                forward = _forward_of_class(called)
        if self.stack is None:
            with _lock:
                self._step_aside()
        return forward(*args, **kwargs)

    def after_hooks(self, take: Callable[[Any], Any]) -> bool:
        """Have `take(value)` called behind the module's forward hooks; `False` where this call has none.

        `__call__` reads the list of hooks when the forward has returned, so one that is added now still runs. It comes last,
        but before hooks that only record: those are to see an edit. Only a tap's `__call__` calls this.
        """
        frame = _torch_frame(sys._getframe(2))
        if _module_called(frame) is not self.module:  # a direct `.forward()` runs no hooks
            return False
        call = id(frame)
        hooks = self.module._forward_hooks
        order = list(hooks)
        handle = RemovableHandle(hooks)

        def last_hook(module: torch.nn.Module, args: Any, value: Any) -> Any:
            if id(_torch_frame(sys._getframe(1))) != call:
                return None  # a hook of the user's, or another thread, has called the module meanwhile
            put_back()
            pending.remove(put_back)
            return take(value)

        def put_back() -> None:
            handle.remove()
            for key in order:
                if key in hooks:
                    hooks[key] = hooks.pop(key)

        # Noted first and put in last: after an interrupt in between, what is taken down still includes it.
        pending = self.pending = self.pending or []
        pending.append(put_back)
        hooks[handle.id] = last_hook
        for key in order:
            if _only_records(hooks[key]):
                hooks[key] = hooks.pop(key)
        return True

    def _stand_in_front(self) -> None:
        """Stand in front of whatever `forward` the module has of its own."""
        module = self.module
        original = module.__dict__.get("forward", ABSENT)
        if isinstance(original, Tap) and original.module is not module:
            original = ABSENT  # shared with the module this one is a shallow copy of
        self._original = original
        self.__wrapped__ = _forward_of_class(module) if original is ABSENT else original
        module.__dict__["forward"] = self

    def _step_aside(self) -> None:
        """Stand in front of nothing any more, unless somebody has wrapped this tap: theirs stays, and this passes through."""
        self.stack, pending, self.pending = None, self.pending, None
        self.spent = True
        for put_back in pending or ():
            put_back()  # a forward hook of the user's has raised before ours
        own = self.module.__dict__
        outer = own.get("forward")
        if outer is self:
            self._give_back(own)
        while isinstance(outer, Tap) and outer is not self:
            if outer._original is self:
                outer._original = self._original
                if outer.__wrapped__ is self:  # at an operation it is the call in progress
                    outer.__wrapped__ = self.__wrapped__
            outer = outer._original
        _without_silent(own)

    def _give_back(self, own: dict[str, Any]) -> None:
        """Put back exactly what was there before."""
        if self._original is ABSENT:
            del own["forward"]
        else:
            own["forward"] = self._original

    # What else code looks up on a module's `forward`. Not `__getattr__`: with one, every look-up on a tap is ten times slower.
    @property
    def __func__(self) -> Any:
        return self.__wrapped__.__func__  # type: ignore[attr-defined]

    @property
    def __self__(self) -> Any:
        return self.__wrapped__.__self__  # type: ignore[attr-defined]

    @property
    def __name__(self) -> Any:
        return self.__wrapped__.__name__

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tap":
        made = _silent(copy.deepcopy(self.module, memo), *(copy.deepcopy(each, memo) for each in self._state()))
        memo[id(made)] = _Gone(made)  # what the copying keeps until it has ended
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _silent, (self.module, *self._state())

    def _state(self) -> tuple[Any, ...]:
        """The module's own `forward` below the taps, where it has one."""
        original = self.innermost()._original
        return () if original is ABSENT else (original,)

    def innermost(self) -> "Tap":
        """The tap that stands directly in front of the module's own forward: this, or another run's."""
        tap: Tap = self
        while isinstance(tap._original, Tap):
            tap = tap._original
        return tap


class _Gone:
    """Takes a silent tap out of its module when this goes."""

    def __init__(self, tap: Tap) -> None:
        self._tap = tap

    def __del__(self) -> None:
        with _lock:
            if self._tap.own.get("forward") is self._tap:
                self._tap._give_back(self._tap.own)


def _silent(module: torch.nn.Module, *original: Any) -> Tap:
    """What the copy of a tapped module gets in its `forward`: it passes one call through, and is gone."""
    tap = Tap()
    tap.module, tap.own, tap.stack, tap.pending, tap.spent = module, module.__dict__, None, None, True
    tap._original = original[0] if original else ABSENT
    tap.__wrapped__ = original[0] if original else _forward_of_class(module)
    return tap


def tap_at(tap: T, module: torch.nn.Module) -> T:
    """Make `tap` one of `module`, to be put up there any number of times."""
    tap.module = module
    tap.own = module.__dict__
    tap.pending = None
    tap.spent = False
    return tap


def put_up(tap: Tap, stack: Any) -> None:
    """Have the tap hear its module's calls on `stack`."""
    own = tap.own
    if "forward" not in own:
        tap.stack = stack
        tap._original = ABSENT
        tap.__wrapped__ = tap.module.forward
        if own.setdefault("forward", tap) is tap:  # atomic, so the usual case needs no lock
            return
    with _lock:
        _without_silent(own)
        tap.stack = stack
        tap._stand_in_front()


def put_innermost(tap: Tap, stack: Any) -> None:
    """Have the tap hear what the other taps of its module call: it stands directly in front of the module's own forward."""
    tap.stack = stack
    with _lock:
        outer = tap.own.get("forward")
        if not isinstance(outer, Tap) or outer.module is not tap.module:
            tap._stand_in_front()
        else:
            above = outer.innermost()
            tap._original, tap.__wrapped__ = above._original, above.__wrapped__
            above._original = above.__wrapped__ = tap


def _without_silent(own: dict[str, Any]) -> None:
    """Take out taps that hear nothing any more, which somebody has saved and put back."""
    while isinstance(outer := own.get("forward"), Tap) and outer.stack is None:
        outer._give_back(own)


def own_forward(module: torch.nn.Module) -> Callable[..., Any]:
    """The module's forward below all taps."""
    forward = module.__dict__.get("forward", ABSENT)
    if isinstance(forward, Tap):
        forward = forward.innermost()._original
    return _forward_of_class(module) if forward is ABSENT else forward


def in_class(kind: type[torch.nn.Module]) -> Any:
    """The `forward` that a class has, or one it is made from, as it is written there."""
    forward = vars(kind).get("forward", ABSENT)
    return next(vars(each)["forward"] for each in kind.__mro__ if "forward" in vars(each)) if forward is ABSENT else forward


def _forward_of_class(module: torch.nn.Module) -> Callable[..., Any]:
    """What `module.forward` is without one of its own, found as Python finds it."""
    kind = type(module)
    forward = in_class(kind)
    if type(forward) is FunctionType:
        return MethodType(forward, module)  # the common case
    if not hasattr(forward, "__get__"):
        return forward  # type: ignore[no-any-return]
    try:
        return forward.__get__(module, kind)  # type: ignore[no-any-return]
    except AttributeError:  # of a traced module (torch 2.13)
        return module.__getattr__("forward")  # type: ignore[return-value]


def take_down(taps: Iterable[Tap]) -> None:
    """Stop hearing; where nobody else listens, the modules are as they were before."""
    with _lock:
        for tap in taps:
            own = tap.own
            if own.get("forward") is not tap or tap.pending:  # the first also where Ctrl-C came before it was put up
                tap._step_aside()
            elif tap._original is ABSENT:
                del own["forward"]
                tap.stack = None
            elif isinstance(tap._original, Tap) and tap._original.stack is not None:  # of a run that goes on
                own["forward"] = tap._original
                tap.stack = None
            else:
                tap._step_aside()


@contextlib.contextmanager
def with_a_hook(tap: Tap) -> Iterator[None]:
    """While the block runs the tap's module has a forward hook, which does nothing."""
    hooks = tap.module._forward_hooks
    handle = RemovableHandle(hooks)
    # Noted first and forgotten last: after an interrupt in between, the tap takes the hook with it.
    pending = tap.pending = tap.pending or []
    pending.append(handle.remove)
    try:
        hooks[handle.id] = lambda *_: None
        yield
    finally:
        handle.remove()
        pending.remove(handle.remove)


def put_aside(module: torch.nn.Module, name: str, user: object) -> bool:
    """Have an attribute of the module itself be `None` until all its users put it forth; whether it has such a one."""
    own = module.__dict__
    with _lock:
        value, users = _aside.get((id(own), name), (own.get(name), set[object]()))
        if value is not None:
            users.add(user)
            _aside[id(own), name] = value, users  # before it is taken out: Ctrl-C may come in between
            own[name] = None
    return value is not None


def put_forth(module: torch.nn.Module, name: str, user: object) -> None:
    """Put back what `user` has put aside, if nobody else has it aside; done twice, it changes nothing."""
    own = module.__dict__
    with _lock:
        value, users = _aside.get((id(own), name), (None, set[object]()))
        users.discard(user)
        if not users and value is not None:
            if own.get(name) is None:
                own[name] = value
            del _aside[id(own), name]


def exchange(module: torch.nn.Module, name: str, value: Any) -> Any:
    """Put `value` into an attribute of the module itself; what was there, which a second exchange puts back."""
    before = module.__dict__[name]
    module.__dict__[name] = value
    return before


def _torch_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame that calls a module."""
    while frame is not None and frame.f_globals is not torch_module.__dict__:
        frame = frame.f_back
    return frame


def _only_records(hook: Any) -> bool:
    """Whether a forward hook is transformers' output recorder, left behind by the first call that asks for outputs."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.utils.")


def _module_called(frame: FrameType | None) -> torch.nn.Module | None:
    """The module whose `__call__` runs in `frame`; `None` where it is another function's frame."""
    if frame is None or frame.f_globals is not torch_module.__dict__:
        return None
    return frame.f_locals.get("self")
