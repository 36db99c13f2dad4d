"""Map, narrow and splice tensors inside tuples, dicts, model outputs, caches.

shapes(layer.output)          # (torch.Size([1, 10, 768]), (torch.Size([1, 12, 10, 64]), torch.Size([1, 12, 10, 64])))
first_tensor(layer.output)    # the hidden states, however they are wrapped
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def shapes(value: Any) -> Any:
    """The nested shapes of `value`.

        shapes(model.transformer.h[-1].output)    # (torch.Size([1, 10, 768]), (torch.Size([1, 12, 10, 64]), ...))

    A tensor becomes its `torch.Size`; tuples, lists, dicts and model outputs keep their form; anything else stays as it is.
    """
    if isinstance(value, torch.Tensor):
        return value.shape
    if isinstance(value, Mapping):
        return {key: shapes(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map(shapes, value)) if type(value) in (tuple, list) else tuple(map(shapes, value))
    if is_struct(value):
        return {field.name: shapes(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def is_struct(value: Any) -> bool:
    """Whether `value` is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in `value`, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif is_struct(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))


def first_tensor(value: Any) -> torch.Tensor | None:
    """The first tensor in `value`; `None` where it has none."""
    return next(tensors(value), None)


def with_first_tensor(value: Any, new: Any) -> Any:
    """`value` with `new` in the place of its first tensor; nothing given is changed."""
    replaced, done = _replace_first(value, new)
    if not done:
        raise LookupError("no tensor to replace")
    return replaced


def _replace_first(value: Any, new: Any) -> tuple[Any, bool]:
    """The replacement, and whether there was a tensor to replace."""
    if isinstance(value, torch.Tensor):
        return new, True
    if isinstance(value, Mapping):
        return _replace_in(value, list(value.items()), new)
    if isinstance(value, (tuple, list)):
        return _replace_in(value, list(enumerate(value)), new)
    if is_struct(value):
        return _replace_in(value, [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)], new)
    return value, False


def _replace_in(value: Any, items: list[tuple[Any, Any]], new: Any) -> tuple[Any, bool]:
    """Replace in the first of `items` that has a tensor, and build a `value` of the same type around it."""
    for key, item in items:
        replaced, done = _replace_first(item, new)
        if done:
            return with_item(value, key, replaced), True
    return value, False


def with_item(value: Any, key: Any, item: Any) -> Any:
    """A copy of the container `value` in which `key` stands for `item`."""
    if isinstance(value, Mapping):
        # A transformers `ModelOutput` is a dataclass and a dict at once; only `replace` keeps both in step.
        return dataclasses.replace(value, **{key: item}) if is_struct(value) else type(value)({**value, key: item})  # type: ignore[call-arg,type-var]
    if is_struct(value):
        return dataclasses.replace(value, **{key: item})
    items = [*value[:key], item, *value[key + 1 :]]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def described(value: Any) -> str:
    """Shape and dtype in a few characters, for messages."""
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (tuple, list)):
        inside = ", ".join(map(described, value))
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    return type(value).__name__
