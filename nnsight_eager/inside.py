"""What a module computes within its forward, as a small module of its own, so that it is a point like any other.

An attention pattern and an operation in the source are such parts. While a run asks for one, the owner's forward is made to
call it; how, each kind of part knows.
"""

from collections.abc import Hashable
from typing import Any, Protocol

import torch


class Apart(Protocol):
    """What one run does to an owner, so that parts of its forward are called apart."""

    def begin(self) -> None:
        """From here on have the owner's parts called apart."""

    def hear(self, part: "Part", ear: Any) -> None:
        """Have `ear` called where the owner computes `part`."""

    def passed(self, part: "Part", begun: bool, entering: bool, further: bool) -> bool:
        """Whether it is too late to ask for `part` in the owner's call in progress: it has come by it, or would not be heard.

        `begun`: that call is past the owner's input. `entering`: asked is for its input. `further`: any visit to come will do.
        """

    def came_by(self, part: "Part") -> bool:
        """Whether the owner's last call has come by `part`, as far as anyone can tell."""

    def end(self) -> None:
        """Have the owner's forward be as it was, also where `begin` was interrupted; done twice, it changes nothing."""


class Part(torch.nn.Module):
    """One part of an owner's forward; `path` is how it is found in the tree."""

    owner: torch.nn.Module
    path: str
    around: torch.nn.Module  # the innermost that it is called in: its owner, or another part of that

    def __init__(self, owner: torch.nn.Module, path: str, around: torch.nn.Module | None = None) -> None:
        super().__init__()
        # Not as children: the part does not contain its owner.
        self.__dict__.update(owner=owner, path=path, around=owner if around is None else around)

    def lies_in(self, module: torch.nn.Module) -> bool:
        """Whether it is called only where `module` is."""
        around = self.around
        if around is module or (isinstance(around, Part) and around.lies_in(module)):
            return True
        return any(each is self.owner for each in module.modules())

    def of(self, owner: torch.nn.Module) -> "Part":
        """The same part of another owner's forward."""
        raise NotImplementedError

    @property
    def key(self) -> Hashable:
        """The same for all parts that are called apart together."""
        raise NotImplementedError

    def apart(self, stack: Any) -> Apart:
        """How the parts of this key are called apart where the model runs on `stack`; nothing is done yet."""
        raise NotImplementedError


def lies_in(module: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether a module or a part is inside another, or is that one."""
    return module.lies_in(other) if isinstance(module, Part) else any(each is module for each in other.modules())
