"""Texts that tell weights, edits and data apart, the same in every process.

digest([4, 5, 6])                       # 64 letters
weights(module)
digest(plain(function))                 # its code, and the numbers, texts and tensors that it can see
"""

import dis
import functools
import hashlib
import json
from collections.abc import Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Final

import numpy
import torch

from .names import Names
from .peeling import held
from .tree import Envoy

PLAIN: Final = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    slice,
    range,
    type(None),
    type(...),
    torch.dtype,
    torch.device,
    torch.Size,
)
"""What tells its value by its `repr`."""


def digest(value: Any) -> str:
    """A text for what JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def weights(module: torch.nn.Module) -> str:
    """Tells the weights of a module apart, by a few values of each."""
    return digest([*map(_sampled, module.state_dict().items())])


def _sampled(named: tuple[str, Any]) -> list[Any]:
    """A weight's name and form with eight of its values: another training of the model has others."""
    name, weight = named
    if not isinstance(weight, torch.Tensor):
        return [name, str(type(weight))]
    values: list[float] = []
    if hasattr(weight, "full_tensor"):  # of a weight that is divided among ranks, all of which ask, that of the whole
        weight = weight.full_tensor()
    if weight.device.type != "meta" and weight.is_contiguous():
        values = weight.detach().view(-1)[:: max(1, weight.numel() // 8)][:8].float().tolist()
    return [name, str(weight.dtype), list(weight.shape), [str(value) for value in values]]


def plain(value: Any) -> Any:
    """A value as JSON; a program as its code and what it can see. Of an object this is its type and its plain attributes."""
    if isinstance(value, Names):
        code, seen = value.seen()
        return [_of_code(code), _inside(seen)]
    if isinstance(value, FunctionType):
        named = {name: value.__globals__[name] for name in _names_in(value.__code__) if name in value.__globals__}
        return [_inside(value), _inside(dict(sorted(named.items())))]
    return _inside(value)


def _inside(value: Any, above: tuple[int, ...] = ()) -> Any:
    """A value that a program can see: a function as its code and what it has been given, whatever the names in it mean."""
    if isinstance(value, PLAIN):
        return repr(value)
    if id(value) in above:
        return "itself"
    inside = functools.partial(_inside, above=(*above, id(value)))
    match value:
        case torch.Tensor():
            return _of_tensor(value)
        case numpy.ndarray() | numpy.generic():
            return [str(value.dtype), inside(value.tolist())]
        case torch.nn.Module():
            return [type(value).__qualname__, weights(value)]
        case Envoy():
            return value._path
        case FunctionType():
            cells = [held(cell) for cell in value.__closure__ or ()]
            return [_of_code(value.__code__), *map(inside, (cells, value.__defaults__, value.__kwdefaults__))]
        case functools.partial():
            return [*map(inside, (value.func, value.args, value.keywords))]
        case MethodType():
            return [*map(inside, (value.__func__, value.__self__))]
        case Mapping():
            return [[repr(key), inside(each)] for key, each in value.items()]
        case list() | tuple():
            return [*map(inside, value)]
        case set() | frozenset():  # which has another order in another process
            return sorted(json.dumps(inside(each)) for each in value)
    own = {} if isinstance(value, (type, ModuleType)) else getattr(value, "__dict__", {})
    attributes = {name: each for name, each in own.items() if isinstance(each, (*PLAIN, torch.Tensor))}
    return [getattr(value, "__qualname__", type(value).__qualname__), inside(attributes)]


def _of_tensor(tensor: torch.Tensor) -> list[Any]:
    """A tensor's form, and a text for all of its values, where it has any."""
    form = [str(tensor.dtype), [*tensor.shape]]
    if tensor.device.type == "meta" or tensor.layout is not torch.strided:
        return form
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    values = whole.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    return [*form, hashlib.sha256(values.numpy().data).hexdigest()]


def _names_in(code: CodeType) -> set[str]:
    """What code, and code that it makes, looks up in its module."""
    own = {each.argval for each in dis.get_instructions(code) if each.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*(_names_in(each) for each in code.co_consts if isinstance(each, CodeType)))


def _of_code(code: CodeType) -> list[Any]:
    """What code does, wherever it stands."""
    constants = [_of_code(each) if isinstance(each, CodeType) else _in_order(each) for each in code.co_consts]
    return [code.co_code.hex(), [*code.co_names], constants]


def _in_order(constant: Any) -> str:
    """A constant in words; a set has another order in another process."""
    return repr(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant)
