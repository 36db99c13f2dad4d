"""A layer that computes with its children's weights, and does not call them, calls them where somebody waits for a point in it.

    layer = torch.nn.TransformerEncoderLayer(8, 2).eval()        # one fused kernel, where no gradient is needed
    with NNsight(layer).trace(x):
        layer.linear1.output                                     # by the slower path, as with a forward hook

torch leaves the fused path itself where a module in the layer has a hook, so that is what it is given.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch

from .taps import with_a_hook
from .visits import Visit

FAST: Final = torch.nn.TransformerEncoderLayer


def leave_where_seen(visit: Visit, visits: Mapping[int, Visit]) -> None:
    """Have the layer that this visit is to call its children, if one of the ears among `visits` in it is waited for."""
    layer, forward = visit.module, visit.__wrapped__
    inside = [*map(id, layer.modules())][1:]

    def called(*args: Any, **kwargs: Any) -> Any:
        ears = (visits.get(key) for key in inside)
        if any(ear is not None and ear.forward is visit.forward and _is_waited_for(ear) for ear in ears):
            with with_a_hook(layer):
                return forward(*args, **kwargs)
        return forward(*args, **kwargs)

    visit.__wrapped__ = called


def _is_waited_for(ear: Visit) -> bool:
    return ear.stop_before or ear.stop_after or bool(ear.watchers) or (ear.forward is not None and ear.forward.walking)
