"""Map, narrow and splice tensors inside tuples, dicts, model outputs, caches.

shapes(layer.output)          # (torch.Size([1, 10, 768]), (torch.Size([1, 12, 10, 64]), torch.Size([1, 12, 10, 64])))
first_tensor(layer.output)    # the hidden states, however they are wrapped
"""

import contextlib
import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch

PLAIN: Final = frozenset({type(None), bool, int, float, str, torch.Tensor, torch.Size, torch.dtype, torch.device})
"""Types that hold nothing further, told by a look-up: most of what is met is of them."""

Where = Callable[[torch.Tensor], slice | None]
"""Tells the rows of an invoke in a tensor; `None` where it has none of its own."""


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


def items(value: Any) -> list[tuple[Any, Any]]:
    """What a container holds, by key; nothing for a tensor or a plain value."""
    if type(value) in PLAIN:
        return []
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if is_struct(value):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return list(vars(value).items()) if is_cache(value) else []


def is_cache(value: Any) -> bool:
    """Whether `value` is a transformers key/value cache, or a layer of one; some models have a class of their own."""
    return hasattr(value, "__dict__") and any(map(_caches, type(value).__mro__))


def _caches(each: type) -> bool:
    own = each.__name__.endswith("Cache") and each.__module__.startswith("transformers.models.")
    return own or each.__module__ == "transformers.cache_utils"


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in `value`, in order."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    for _, item in items(value):
        if isinstance(item, torch.Tensor):
            yield item
        elif type(item) not in PLAIN:
            yield from tensors(item)


def small_tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a value but for those of a key/value cache, which are many and not looked at."""
    if isinstance(value, torch.Tensor):
        yield value
    elif not is_cache(value):
        for _, item in items(value):
            yield from small_tensors(item)


def first_tensor(value: Any) -> torch.Tensor | None:
    """The first tensor in `value`; `None` where it has none."""
    if isinstance(value, torch.Tensor):
        return value
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
    for key, item in items(value):
        replaced, done = _replace_first(item, new)
        if done:
            return with_items(value, {key: replaced}), True
    return value, False


def with_items(value: Any, changes: dict[Any, Any]) -> Any:
    """A copy of the container `value` with some of its items changed; `value` itself where there is nothing to change."""
    if not changes:
        return value
    if isinstance(value, Mapping) and not is_struct(value):
        return type(value)({**value, **changes})  # type: ignore[call-arg]
    if is_struct(value):
        # A transformers `ModelOutput` is a dataclass and a dict at once; only `replace` keeps both in step.
        replaced = dataclasses.replace(value, **changes)
        if isinstance(value, OrderedDict):  # by `output[0]` a model means the first that was set, not the first field
            for key in filter(replaced.__contains__, value):
                replaced.move_to_end(key)
        return replaced
    if isinstance(value, (tuple, list)):
        changed = [changes.get(number, item) for number, item in enumerate(value)]
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    changed = copy.copy(value)
    vars(changed).update(changes)
    return changed


def mapped(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with what `function` gives for each tensor in its place; `value` itself where nothing changes."""
    if isinstance(value, torch.Tensor):
        return function(value)
    done = {key: (item, mapped(item, function)) for key, item in items(value)}
    return with_items(value, {key: new for key, (old, new) in done.items() if new is not old})


def copied(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`mapped`, with the lists, dicts and key/value caches in it copied too, which a model goes on to fill."""
    if isinstance(value, torch.Tensor):
        return function(value)
    done = {key: (item, copied(item, function)) for key, item in items(value)}
    changes = {key: new for key, (old, new) in done.items() if new is not old}
    if not changes and (type(value) in (list, dict) or is_cache(value)):
        return copy.copy(value)
    return with_items(value, changes)


def narrow(value: Any, where: Where) -> Any:
    """`value` with every tensor that `where` gives rows of narrowed to them, a view; what has none is shared."""
    return mapped(value, lambda tensor: tensor if (rows := where(tensor)) is None else tensor[rows])


def splice(whole: Any, part: Any, where: Where) -> Any:
    """`whole` with the rows that `where` tells replaced by those of `part`, which is built as `narrow(whole, where)` is.

    A key/value cache stays the same object, since others hold it too. Raises `ValueError` where `part` does not fit, or
    changes what has no rows.
    """
    if part is whole:
        return whole
    if isinstance(whole, torch.Tensor):
        return _spliced(whole, part, where(whole))
    old, new = items(whole), dict(items(part))
    if not old and not new:
        if whole is not part and type(whole) is type(part) and whole == part:
            return whole
        raise ValueError(f"{described(part)} in the place of {described(whole)}, which all invokes share")
    if type(whole) is not type(part) or [key for key, _ in old] != [*new]:
        raise ValueError(f"{described(part)} in the place of {described(whole)}")
    changes = {key: done for key, item in old if (done := splice(item, new[key], where)) is not item}
    if not is_cache(whole):
        return with_items(whole, changes)
    vars(whole).update(changes)
    return whole


def _spliced(whole: torch.Tensor, part: Any, rows: slice | None) -> torch.Tensor:
    """A tensor with some rows replaced; itself where `part` is its rows already."""
    if not isinstance(part, torch.Tensor):
        raise ValueError(f"{described(part)} in the place of a tensor {described(whole)}")
    if rows is None:
        raise ValueError(f"a new value for {described(whole)}, which all invokes share")
    there = whole[rows]
    if part.shape != there.shape:
        raise ValueError(f"{described(part)} in the place of {described(there)}")
    if not torch.can_cast(part.dtype, there.dtype):
        raise ValueError(f"{described(part)} in the place of {described(there)}, which cannot hold it")
    if _is_same(part, there) and _has_gradient_of(whole, part):
        return whole
    with as_where_made(whole, part):
        return torch.cat((whole[: rows.start], part.to(there), whole[rows.stop :]))


def _is_same(part: torch.Tensor, there: torch.Tensor) -> bool:
    """Whether two tensors of one shape are the same memory, read in the same way."""
    if part.device != there.device or part.dtype != there.dtype or part.stride() != there.stride():
        return False
    return part.data_ptr() == there.data_ptr() and part.is_conj() == there.is_conj() and part.is_neg() == there.is_neg()


def as_where_made(whole: torch.Tensor, *others: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Work on parts of `whole` as where it was made: its gradient must not end where some code reads it under `no_grad`."""
    inference = whole.is_inference()
    differentiable = whole.requires_grad or any(each.requires_grad for each in others)
    if torch.is_inference_mode_enabled() == inference and (torch.is_grad_enabled() or not differentiable):
        return _AS_IT_IS
    return _with_modes(inference, differentiable)


_AS_IT_IS: Final = contextlib.nullcontext()


@contextlib.contextmanager
def _with_modes(inference: bool, differentiable: bool) -> Iterator[None]:
    with torch.inference_mode(inference), torch.set_grad_enabled(differentiable):
        yield


def _has_gradient_of(whole: torch.Tensor, view: torch.Tensor) -> bool:
    """Whether the gradient of a view is that of the whole: a detached one, or a custom function's, shares memory only."""
    if not (whole.requires_grad and view.requires_grad):
        return not (whole.requires_grad or view.requires_grad)
    made_from = view.grad_fn.next_functions if view.grad_fn is not None else ()
    return [node for node, _ in made_from] == [whole.grad_fn]


def described(value: Any) -> str:
    """Shape and dtype in a few characters, for messages."""
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (tuple, list)):
        inside = ", ".join(map(described, value))
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    return type(value).__name__
