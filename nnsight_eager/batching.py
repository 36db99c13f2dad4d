"""Several inputs as one batch, and each invoke's rows of any value in it.

    together, sizes = joined([Given((x,), {}), Given((y,), {})])     # one call's arguments, rows of each input
    rows = divided(sizes)                                            # [Rows(0, 2, 5), Rows(2, 5, 5)]
    rows[0].seen(layer_output, factors)                              # a view of the first input's rows

Rows are dimension 0. Its size is the number of rows of the batch, or that times a factor the run knows: beams, sequences to
return, the sequence length where tokens are flattened to `[batch * seq, ...]`. A size of 1 is shared. Anything else has no
rows: alone it is refused, inside a structure it is shared, and a structure in which nothing has rows is refused.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any, Final, NamedTuple

import torch

from .errors import BatchError, EditError, RowsError
from .nested import Where, described, first_tensor, items, narrow, splice, tensors, with_items

PLAIN: Final = (type(None), bool, int, float, complex, str, bytes, tuple, list, dict, torch.dtype, torch.device)
"""Values without tensors that are the same for every row."""

Factors = Callable[[int], Collection[int]] | None
"""Gives, for the number of rows, by what it may be multiplied in the run; `None` where no size tells rows."""


class Given(NamedTuple):
    """What one invoke was given: the arguments of its call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        first = next(iter((*self.args, *self.kwargs.values())), None)
        text = repr(first) if isinstance(first, str) else described(first)
        return text if len(text) <= 40 else f"{text[:36]}…{text[-1]}"


class Rows(NamedTuple):
    """The rows of one invoke in a batch of `total`."""

    start: int
    stop: int
    total: int

    def of(self, tensor: torch.Tensor, factors: Factors) -> slice | None:
        """Where this invoke's rows are in `tensor`; `None` where they cannot be told, or it is shared."""
        if factors is None or is_shared(tensor):
            return None
        factor, rest = divmod(tensor.shape[0], self.total)
        if rest or not (factor == 1 or factor in factors(self.total)):
            return None
        return slice(self.start * factor, self.stop * factor)

    def seen(self, value: Any, factors: Factors, point: Callable[[], str]) -> Any:
        """This invoke's rows of `value`: views, so that a change in place is a change of the whole."""
        if self.all:
            return value
        self.require(value, factors, point)
        return narrow(value, self._where(factors))

    @property
    def all(self) -> bool:
        """Whether these are all rows there are."""
        return self.stop - self.start == self.total

    def require(self, value: Any, factors: Factors, point: Callable[[], str]) -> None:
        """Raise where nothing in `value` has rows, and it is not shared by all either."""
        if isinstance(value, torch.Tensor) and self.of(value, factors) is not None:
            return
        inside = list(tensors(value))
        shared = (
            factors is not None and all(map(is_shared, inside)) if inside else isinstance(value, PLAIN) or bool(items(value))
        )
        if not shared and all(self.of(each, factors) is None for each in inside):
            raise RowsError(
                f"The rows of this invoke in `{point()}` cannot be told: it is {described(value)}, and the batch has "
                f"{self.total} rows.",
                "Read it in an invoke that sees all rows: `with tracer.invoke():`, or a function with "
                "`tracer.invoke(prompt, function, rows=None)`.",
                asked=point(),
            )

    def written(self, whole: Any, part: Any, factors: Factors, point: Callable[[], str]) -> Any:
        """`whole` with this invoke's rows replaced by `part`."""
        if self.all:
            return part
        try:
            return splice(whole, part, self._where(factors))
        except ValueError as error:
            raise EditError(
                f"`{point()}` was given {error}.",
                "An invoke replaces its own rows, with a value of their shape; `with tracer.invoke():` sees and replaces all.",
            ) from None

    def _where(self, factors: Factors) -> Where:
        return lambda tensor: self.of(tensor, factors)


def is_shared(tensor: torch.Tensor) -> bool:
    """Whether a tensor is the same for every row: a scalar, or one row for all."""
    return tensor.dim() == 0 or tensor.shape[0] == 1


def is_routed(path: str) -> bool:
    """Whether a module is inside a mixture's `experts`: the tokens it gets may be as many as the rows, and are not the rows."""
    return "experts" in path.split(".")[:-1]


def divided(sizes: Sequence[int]) -> list[Rows]:
    """The rows of each input in the batch."""
    stops = [*accumulate(sizes)]
    return [Rows(stop - size, stop, stops[-1]) for size, stop in zip(sizes, stops, strict=True)]


def factors_in(arguments: Any, total: int) -> set[int]:
    """By what the number of rows may be multiplied in a call with these arguments: beams, and those times a sequence length."""
    batched = [each for each in tensors(arguments) if each.dim() > 1 and each.shape[0] and not each.shape[0] % total]
    repeats = {each.shape[0] // total for each in batched}
    lengths = {each.shape[1] for each in batched if each.dim() < 4}
    return repeats | {repeat * length for repeat in repeats for length in lengths}


def with_shared(given: Given, shared: Mapping[str, Any]) -> Given:
    """The call of a batch with the keywords that were given to the trace itself."""
    twice = given.kwargs.keys() & shared.keys()
    if twice:
        raise BatchError(
            f"`{min(twice)}` is given to the trace and to an invoke.",
            "Give it to each invoke, or to the trace for all of them.",
        )
    return Given(given.args, {**given.kwargs, **shared})


def joined(given: Sequence[Given]) -> tuple[Given, list[int]]:
    """The inputs of several invokes as one call: tensors are concatenated along dimension 0."""
    sizes = [size_of(each) for each in given]
    counted = first_tensor((given[0].args, given[0].kwargs))
    args = _join([each.args for each in given], "the positional arguments", counted, sizes)
    kwargs = _join([each.kwargs for each in given], "the keywords", counted, sizes)
    return Given(args, kwargs), sizes


def size_of(given: Given) -> int:
    """How many rows an input has."""
    sizes = [1 if each.dim() == 0 else each.shape[0] for each in tensors((given.args, given.kwargs))]
    if not sizes:
        raise BatchError(
            f"The input {given} has no tensor, so it has no rows.",
            "Give each invoke its tensors, or override `batch` in a subclass of `NNsight`.",
        )
    return sizes[0]


def _join(values: Sequence[Any], what: str, counted: torch.Tensor | None, sizes: Sequence[int]) -> Any:
    """The same value of each input as one value; `counted` is the tensor of the first that has told the number of its rows."""
    first = values[0]
    if len(values) == 1:
        return first
    if all(isinstance(each, torch.Tensor) for each in values):
        if first is not counted and all(each is first for each in values) and is_shared(first):
            return first
        alike = first.dim() and all(each.shape[1:] == first.shape[1:] and each.dim() == first.dim() for each in values)
        if alike and len({Fraction(len(each), size or 1) for each, size in zip(values, sizes, strict=True)}) == 1:
            return torch.cat(tuple(values))
        raise _unequal(what, values)
    keys = [[key for key, _ in items(each)] for each in values]
    if any(type(each) is not type(first) for each in values) or any(each != keys[0] for each in keys):
        raise _unequal(what, values)
    if not keys[0]:
        if any(each is not first and each != first for each in values):
            raise _unequal(what, values)
        return first
    each_item = [dict(items(each)) for each in values]
    joined_items = {key: _join([each[key] for each in each_item], f"{key!r} in {what}", counted, sizes) for key in keys[0]}
    return with_items(first, joined_items)


def _unequal(what: str, values: Sequence[Any]) -> BatchError:
    return BatchError(
        f"{what[0].upper()}{what[1:]} of the invokes cannot be put into one batch: {', '.join(map(described, values))}.",
        "Give every invoke tensors of one shape but for dimension 0, override `batch` in a subclass of `NNsight`, or give "
        "each a forward pass of its own: `model.trace(batched=False)`.",
    )
