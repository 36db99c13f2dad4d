"""A value in one line.

summary(layer.output)      # [1, 9, 768] float32  cpu  mean 0.01 ± 1.2  range -9.5 … 12.1  3 NaN  grad: AddBackward0
"""

import reprlib
from collections.abc import Iterator
from typing import Any, Final

import torch

from .nested import described, first_tensor, items
from .shown import Column, Grid, Line, Part, Shown

MANY: Final = 40
"""How many values of a container are shown."""

_SHORT: Final = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 76


class Summary(Shown):
    """What `summary` gives: it prints as the line, or lines."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def _parts(self) -> Iterator[Part]:
        held = [] if isinstance(self._value, torch.Tensor) else items(self._value)
        if not held:
            yield Line(one_line(self._value))
            return
        columns = Column("", look="type"), Column("", least=40, broken=True)
        yield Grid(columns, [(str(key), one_line(each)) for key, each in held[:MANY]], headed=False)
        if len(held) > MANY:
            yield Line(f"and {len(held) - MANY} more", "dim")


def summary(value: Any) -> Summary:
    """What a tensor is like, in one line; of a tuple, dict or model output, a line for each value.

        summary(layer.output)      # [1, 9, 768] float32  cpu  mean 0.01 ± 1.2  range -9.5 … 12.1  3 NaN  grad: AddBackward0

    Shape, type, device, mean ± deviation of the population, range, how many values are NaN or infinite, and the node of the
    gradient's graph that made it. Where some are not finite, mean and range are those of the others.
    """
    return Summary(value)


def one_line(value: Any) -> str:
    """A value in one line: of a tensor its shape, type, device, mean ± deviation, range, what is not finite, gradient."""
    try:
        if isinstance(value, torch.Tensor):
            return "  ".join(_of_tensor(value))
        return _SHORT.repr(value) if first_tensor(value) is None else described(value)
    except Exception:  # an object of somebody else's class may do anything
        return f"<{type(value).__name__}>"


def _of_tensor(value: torch.Tensor) -> Iterator[str]:
    yield described(value)
    yield str(value.device)
    if value.numel() and value.device.type != "meta" and type(value).__name__ != "FakeTensor":
        try:
            yield from _statistics(value.detach())
        except (RuntimeError, TypeError):  # torch has no arithmetic for it, as for a quantized tensor
            yield "no statistics"
    if value.requires_grad:
        yield "grad" if value.is_leaf else f"grad: {type(value.grad_fn).__name__}"


def _statistics(value: torch.Tensor) -> list[str]:
    """What the values of a tensor are like; of the finite ones, where some are not."""
    if value.dtype == torch.bool:
        return [f"{int(value.sum()):,} of {value.numel():,} true"]
    if value.is_complex():
        value = value.abs()
    if value.is_floating_point() and value.element_size() == 1:
        value = value.float()  # an 8-bit type has hardly any arithmetic
    finite = value[value.isfinite()] if value.is_floating_point() else value
    words = []
    if finite.numel():
        form = "{:.4g}" if finite.is_floating_point() else "{}"
        low, high = (form.format(each.item()) for each in finite.aminmax())
        if value.is_floating_point():
            deviation = float(finite.double().std(correction=0))
            words.append(f"mean {float(finite.double().mean()):.4g} ± {deviation:.4g}")
        words.append(f"range {low} … {high}")
    for what, count in (("NaN", int(value.isnan().sum())), ("infinite", int(value.isinf().sum()))):
        if count:
            words.append(f"{count:,} {what}")
    return words
