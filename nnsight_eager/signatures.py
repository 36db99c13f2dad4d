"""What a function can be called with, told from its code where it can be: asking `inspect` takes as long as a trace.

takes(function)                                 # whether `function()` is a call it takes
takes(model.forward, {"input_ids": ids})        # whether `model.forward(input_ids=ids)` is
keywords_of(model.forward)                      # the names of its parameters
"""

import inspect
import weakref
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import Any, Final

# What transformers' decorators have wrapped is looked through to the function inside, which is slow.
_parameters: Final[weakref.WeakKeyDictionary[FunctionType, frozenset[str]]] = weakref.WeakKeyDictionary()


def takes(function: Callable[..., Any], given: Mapping[str, Any] | None = None) -> bool:
    """Whether the function can be called with these keywords alone."""
    given = given or {}
    plain, bound = (function.__func__, 1) if isinstance(function, MethodType) else (function, 0)
    if isinstance(plain, FunctionType) and not plain.__dict__ and _has_named(plain, bound):
        return _plainly_takes(plain, bound, given)
    try:
        inspect.signature(function).bind(**given)
    except TypeError:
        return False
    except ValueError:  # it has no signature to look at
        return True
    return True


def _has_named(function: FunctionType, bound: int) -> bool:
    """Whether all positional parameters have names that can be given, those that are bound among them."""
    return not function.__code__.co_posonlyargcount and function.__code__.co_argcount >= bound


def _plainly_takes(function: FunctionType, bound: int, given: Mapping[str, Any]) -> bool:
    """The same of a function that nothing has wrapped, `bound` of whose parameters are given already."""
    code = function.__code__
    count, last = code.co_argcount, code.co_argcount + code.co_kwonlyargcount
    optional = function.__kwdefaults__ or ()
    needed = code.co_varnames[bound : count - len(function.__defaults__ or ())]
    needed += tuple(name for name in code.co_varnames[count:last] if name not in optional) if last > count else ()
    if needed and not given.keys() >= {*needed}:
        return False
    return not given or bool(code.co_flags & inspect.CO_VARKEYWORDS) or given.keys() <= {*code.co_varnames[bound:last]}


def keywords_of(function: Callable[..., Any]) -> frozenset[str]:
    """The names of the function's parameters."""
    plain = function.__func__ if isinstance(function, MethodType) else None
    if not isinstance(plain, FunctionType):
        return frozenset(inspect.signature(function).parameters)
    if plain not in _parameters:
        _parameters[plain] = frozenset(inspect.signature(function).parameters)
    return _parameters[plain]
