"""`NNsight`: the root envoy for any `nn.Module`.

model = NNsight(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()))
with model.trace(torch.randn(1, 4)):
    hidden = model[0].output
"""

from collections.abc import Callable
from typing import Any

import torch

from .errors import InputError
from .run import Call
from .trace import Trace
from .tree import Envoy, Tree


class NNsight(Envoy):
    """The root of the envoys of any module; `trace` runs it."""

    def __init__(self, module: torch.nn.Module) -> None:
        """Wrap `module`, which is not changed: outside a trace it runs at its own speed."""
        if not isinstance(module, torch.nn.Module):
            raise InputError(
                f"`{type(self).__name__}(...)` was given `{type(module).__name__}`, which is not a `torch.nn.Module`.",
                "Pass the module itself; `LanguageModel` also takes a model's name or folder.",
            )
        super().__init__(module, "", Tree(module))

    def trace(self, *args: Any, fn: str | Callable[..., Any] | None = None, **kwargs: Any) -> Trace:
        """Run the model on the arguments with its insides open.

            with model.trace(x) as tracer:
                hidden = model.layers[3].output       # the forward pass is paused here
                model.layers[3].output = hidden * 0
            tracer.result

        `fn` names another method to call (`fn="encode"`) or is any callable that runs the model.
        """
        return Trace(self._tree, self._call(fn, args, kwargs))

    def _call(self, fn: str | Callable[..., Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """What a trace runs."""
        if fn is None or fn == "forward":
            return Call("forward", self._module, args, kwargs)
        if isinstance(fn, str):
            method = getattr(self._module, fn, None)
            if not callable(method):
                raise InputError(self._unknown(fn), '`fn="..."` names a method of the model, or is a callable that runs it.')
            return Call(fn, method, args, kwargs)
        if not callable(fn):
            raise InputError(
                f"`fn` was given {fn!r}.", '`fn="..."` names a method of the model, or is a callable that runs it.'
            )
        return Call(getattr(fn, "__qualname__", type(fn).__qualname__), fn, args, kwargs)
