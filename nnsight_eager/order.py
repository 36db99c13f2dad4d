"""Which modules a model runs in a step, how often and inside which: learned from one whole run.

The first run of a model listens at every module and learns this. Later runs listen only where somebody asks, and use it to
know three things that listening at one module cannot tell: that a module was already visited before anyone asked for it
(where it is used several times), whose forward is still going on around it, and, when a point was not found, whether it had
been passed or never runs.
"""

import weakref
from collections.abc import Iterable

import torch


class Order:
    """What one whole run has shown."""

    __slots__ = ("_later", "_modules", "_sets", "around", "repeats")

    def __init__(self) -> None:
        """Nothing is known yet."""
        # Keyed by identity, since a module may define equality; the weak reference tells a reused address apart.
        self._modules: dict[int, weakref.ref[torch.nn.Module]] = {}
        # The modules inside whose forward each was visited, by identity; one and the same set for all that share it.
        self.around: dict[int, frozenset[int]] = {}
        self._sets: dict[frozenset[int], frozenset[int]] = {}
        # The modules that were visited more than once in a step, by identity.
        self.repeats: dict[int, None] = {}
        self._later: dict[int, None] = {}

    def note(self, module: torch.nn.Module, around: Iterable[torch.nn.Module], step: int, visits: int) -> None:
        """A module is visited for the `visits`-th time in `step`, inside the calls `around` it."""
        key = id(module)
        if key not in self._modules:
            self._modules[key] = weakref.ref(module)
            self.around[key] = frozenset()
        together = self.around[key].union(map(id, around))
        self.around[key] = self._sets.setdefault(together, together)
        if step:
            self._later[key] = None
        if visits > 1:
            self.repeats[key] = None

    def runs(self, module: torch.nn.Module, step: int = 0) -> bool:
        """Whether the module is visited in `step`: an encoder runs in the first of a generation only."""
        known = self._get(id(module)) is module
        return known and (not step or not self._later or id(module) in self._later)

    @property
    def repeated(self) -> list[torch.nn.Module]:
        """The modules that were visited more than once in a step."""
        return self.living(self.repeats)

    def living(self, keys: Iterable[int]) -> list[torch.nn.Module]:
        """The modules behind `keys` that still exist."""
        return [module for key in keys if (module := self._get(key)) is not None]

    def _get(self, key: int) -> torch.nn.Module | None:
        reference = self._modules.get(key)
        return None if reference is None else reference()
