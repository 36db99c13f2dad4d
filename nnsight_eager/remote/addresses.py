"""Where a point is, in words that both sides understand: the trees of client and server have the same paths.

paths = Paths(root)
paths.address(root.transformer.h[1].attn)         # ("transformer.h.1.attn", "", ())
paths.module("transformer.h.1.attn")
"""

from typing import Any

import torch

from ..attention import AttentionPattern
from ..calls import OperationPart
from ..errors import RemoteError
from ..visits import INPUT, OUTPUT

Address = tuple[str, str, tuple[str, ...]]
"""The path of a module, and what part of it, "" for itself: ("transformer.h.1.attn", "source", ("self_c_proj_0",))."""


def same(word: Any) -> Any:
    """The word for a kind of point as this process has it: one that has travelled is equal, and the core tells by identity."""
    return {INPUT: INPUT, OUTPUT: OUTPUT}.get(word, word) if isinstance(word, str) else word


class Paths:
    """The paths of a model's modules, looked up once: a model has thousands."""

    def __init__(self, root: torch.nn.Module) -> None:
        self._root = root
        self._modules: dict[str, torch.nn.Module] = {}
        self._paths: dict[int, str] = {}

    def module(self, path: str) -> torch.nn.Module:
        """The module at a path."""
        if path not in self._modules:
            self._learn()
        try:
            return self._modules[path]
        except KeyError:
            raise RemoteError(
                f"The model has no `{path}` where it runs.", "Modules are added to it by `model.submit`."
            ) from None

    def address(self, module: torch.nn.Module) -> Address:
        """Where a module or a part of one is."""
        if isinstance(module, OperationPart):
            return self.path(module.owner), "source", module.names
        if isinstance(module, AttentionPattern):
            return self.path(module.owner), "pattern", ()
        return self.path(module), "", ()

    def path(self, module: torch.nn.Module) -> str:
        """The path of a module."""
        if id(module) not in self._paths:
            self._learn()
        path = self._paths.get(id(module))
        if path is None:
            raise RemoteError(
                f"`{type(module).__name__}` is not in the model where it runs.", "Add it to the model there, by `model.submit`."
            )
        return path

    def name(self, each: Any) -> tuple[str, str] | None:
        """The name under which both sides have a module of the model; it does not travel."""
        if not isinstance(each, torch.nn.Module):
            return None
        if not self._paths:
            self._learn()
        path = self._paths.get(id(each))
        return None if path is None else ("module", path)

    def _learn(self) -> None:
        self._modules = dict(self._root.named_modules(remove_duplicate=False))
        self._paths = {id(module): path for path, module in reversed(self._modules.items())}
