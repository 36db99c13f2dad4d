"""What to stop at: `run.until(has_nan)`.

A predicate is asked about each tensor that the run comes by, and answers with what it has found, in words, or with something
that is false. Any function will do: `run.until(lambda tensor: tensor.shape[-1] == 64)`.
"""

from collections.abc import Callable, Sequence

import torch

from ..errors import RunError

__all__ = ("has_inf", "has_nan", "norm_above", "shape_is")  # what is offered behind `%until`

Predicate = Callable[[torch.Tensor], object]


def name_of(predicate: Predicate) -> str:
    """What a predicate is called in sentences; raises `RunError` where it is none."""
    if not callable(predicate):
        raise RunError(f"{predicate!r} is no predicate.", "Give a function of a tensor: `has_nan`, `norm_above(100)`.")
    return getattr(predicate, "__name__", type(predicate).__name__)


def has_nan(tensor: torch.Tensor) -> str:
    """`run.until(has_nan)`: on to the first value that has a NaN in it."""
    return _share_of(tensor.isnan(), "NaN")


def has_inf(tensor: torch.Tensor) -> str:
    """`run.until(has_inf)`: on to the first value that has an infinity in it."""
    return _share_of(tensor.isinf(), "infinite")


def norm_above(limit: float) -> Predicate:
    """`run.until(norm_above(100))`: on to the first value of a larger norm, the root of the sum of its squares."""

    def norm_above_limit(tensor: torch.Tensor) -> str:
        norm = float(tensor.detach().double().norm()) if tensor.is_floating_point() else 0.0
        return f"its norm is {norm:.4g}, above {limit:g}" if norm > limit else ""

    return norm_above_limit


def shape_is(*shape: int | Sequence[int] | None) -> Predicate:
    """`run.until(shape_is(1, None, 768))`: on to the first value of this shape; `None` is any size."""
    wanted = shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape

    def has_shape(tensor: torch.Tensor) -> str:
        same = len(tensor.shape) == len(wanted) and all(
            size in (None, own) for size, own in zip(wanted, tensor.shape, strict=True)
        )
        return f"its shape is {list(tensor.shape)}" if same else ""

    return has_shape


def _share_of(found: torch.Tensor, what: str) -> str:
    count = int(found.sum())
    return f"{count:,} of its {found.numel():,} values {'is' if count == 1 else 'are'} {what}" if count else ""
