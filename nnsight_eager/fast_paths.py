"""A layer that computes with its children's weights, and does not call them, calls them where somebody waits for a point in it.

    layer = torch.nn.TransformerEncoderLayer(8, 2).eval()        # one fused kernel, where no gradient is needed
    with NNsight(layer).trace(x):
        layer.linear1.output                                     # by the slower path, as with a forward hook

torch leaves the fused path itself where a module in the layer has a hook, so that is what it is given.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch

from .coroutine import current_stack
from .inside import Part
from .taps import Tap, tap_at, with_a_hook
from .visits import Visit

FAST: Final = torch.nn.TransformerEncoderLayer


class Unfused(Tap):
    """Keeps a layer from its fused path while one run waits for a point in it; it stands below all that listen there."""

    __slots__ = ("_ears", "_inside")

    _ears: Mapping[int, Visit]
    _inside: frozenset[int]

    @classmethod
    def of(cls, layer: torch.nn.Module, ears: Mapping[int, Visit]) -> "Unfused":
        """The tap for this layer of the run that has these `ears`, which is still to be put up."""
        tap = tap_at(cls(), layer)
        tap._ears, tap._inside = ears, frozenset(map(id, layer.modules())) - {id(layer)}
        return tap

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """One call of the layer."""
        if current_stack() is not self.stack:
            return self.pass_through(args, kwargs)
        if any(ear.stack is self.stack and self._is_inside(ear) and _is_waited_for(ear) for ear in self._ears.values()):
            with with_a_hook(self):
                return self.__wrapped__(*args, **kwargs)
        return self.__wrapped__(*args, **kwargs)

    def _is_inside(self, ear: Visit) -> bool:
        """Whether the ear is at a child, at whatever depth, or at an operation in the layer's own forward."""
        at = ear.module
        return id(at) in self._inside or (isinstance(at, Part) and at.owner is self.module)


def _is_waited_for(ear: Visit) -> bool:
    return ear.stop_before or ear.stop_after or bool(ear.watchers) or (ear.forward is not None and ear.forward.walking)
