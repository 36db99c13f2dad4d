"""The Python function in whatever is called, and how to have another in its place.

inner, again = peeled(module.forward)        # the function below its decorators and hooks
again(changed)                               # `changed`, with all of them around it
"""

import ast
import functools
import inspect
from collections.abc import Callable
from types import CellType, FunctionType, MethodType
from typing import Any, Final

from .errors import SourceError
from .operations import Calls, called, dissected, node_of
from .texts import Known, text_of

_called_in: Final = Known[list[frozenset[str]]](lambda _: [])
"""What the wrappers of decorators call."""


def peeled(call: Any) -> tuple[FunctionType, Callable[[FunctionType], Any]]:
    """The Python function in a method, a partial, a decorated function or a callable object, and how to make it that again.

    A decorator is looked through where it calls, by its name, the function it has wrapped, and what accelerate puts around a
    forward where it calls that as an attribute of the module.
    """
    if isinstance(call, MethodType):
        inner, again = peeled(call.__func__)
        return inner, lambda new: MethodType(again(new), call.__self__)
    if isinstance(call, functools.partial):
        wrapped = _wrapped_in_attribute(call)
        if wrapped is not None:
            inner, again = peeled(wrapped)
            return inner, lambda new: _with_attribute(call, wrapped, again(new))
        inner, again = peeled(call.func)
        return inner, lambda new: functools.partial(again(new), *call.args, **call.keywords)
    if isinstance(call, FunctionType):
        cell = _wrapped(call)
        if cell is None:
            return call, lambda new: new
        inner, again = peeled(call.__closure__[cell].cell_contents)  # type: ignore[index]
        return inner, lambda new: _with_cell(call, cell, again(new))
    method = inspect.getattr_static(type(call), "__call__", None)
    if isinstance(method, FunctionType) and not isinstance(call, type):
        return peeled(MethodType(method, call))
    raise SourceError(f"`{called(call)}` is not written in Python, so it has no operations.", "Read its output and its inputs.")


def _wrapped(wrapper: FunctionType) -> int | None:
    """Which cell of a decorator's wrapper holds the function it has wrapped and calls; `None` where it is no such wrapper."""
    original = getattr(wrapper, "__wrapped__", None)
    for number, (name, cell) in enumerate(zip(wrapper.__code__.co_freevars, wrapper.__closure__ or (), strict=True)):
        inner = held(cell)
        is_wrapped = inner is original if original is not None else _divides(wrapper) and isinstance(inner, MethodType)
        if is_wrapped and name in _called_names(wrapper):
            return number
    return None


def _divides(wrapper: FunctionType) -> bool:
    """Whether it is what transformers puts before a forward to divide a module; it does not say what it wraps."""
    return wrapper.__module__.startswith("transformers.distributed.")


def held(cell: CellType) -> Any:
    """What a closure's cell holds; `None` where it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _called_names(function: FunctionType) -> frozenset[str]:
    """The plain names that a function calls. One that hands what it has wrapped to others may run something else."""
    known = _called_in.of(function.__code__)
    if not known:
        found = node_of(function.__code__, text_of(function.__code__, function.__globals__))
        calls = [each.func for each in ast.walk(found[1]) if isinstance(each, ast.Call)] if found else []
        known.append(frozenset(each.id for each in calls if isinstance(each, ast.Name)))
    return known[0]


def _with_cell(wrapper: FunctionType, number: int, value: Any) -> FunctionType:
    """A decorator's wrapper around another function."""
    closure = [*wrapper.__closure__]  # type: ignore[misc]
    closure[number] = CellType(value)
    again = FunctionType(wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, tuple(closure))
    again.__kwdefaults__ = wrapper.__kwdefaults__
    again.__dict__.update(wrapper.__dict__)
    return again


def _wrapped_in_attribute(wrapper: functools.partial[Any]) -> Any:
    """What a wrapper says that it wraps, and calls as an attribute of its first argument: what accelerate hooks into."""
    wrapped = vars(wrapper).get("__wrapped__")
    if wrapped is None or not isinstance(wrapper.func, FunctionType) or not wrapper.args:
        return None
    own = getattr(wrapper.args[0], "__dict__", {})
    first = wrapper.func.__code__.co_varnames[:1]
    callees = [each.callee for each in dissected(wrapper.func).operations.values()]
    called = [own.get(each.attr) for each in callees if isinstance(each, ast.Attribute) and _is_name(each.value, first)]
    return wrapped if wrapped in called else None


def _is_name(node: ast.expr, names: tuple[str, ...]) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def _with_attribute(wrapper: functools.partial[Any], wrapped: Any, value: Any) -> functools.partial[Any]:
    """The same wrapper around another function; what it looks up stays as it is, for others who call it meanwhile."""
    function: Any = wrapper.func
    again = dissected(function).calling(function, Instead(wrapped, value))
    return functools.partial(again, *wrapper.args, **wrapper.keywords)


class Instead(Calls):
    """Has one function called in the place of another."""

    __slots__ = ("_value", "_wrapped")

    def __init__(self, wrapped: Any, value: Any) -> None:
        self._wrapped, self._value = wrapped, value

    def __call__(self, name: str, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call `function`, or what is to be called in its place."""
        return (self._value if function == self._wrapped else function)(*args, **kwargs)
