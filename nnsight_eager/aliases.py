"""Other names for modules: what `rename={...}` gives, and the way between a path in them and the model's own.

    aliases = Aliases(root, {"transformer.h": "layers", GPT2MLP: "mlp", "*.attn": "attention"})
    aliases.at("")                               # {"layers": "transformer.h"}: names at the root, and what they stand for
    aliases.shown("transformer.h.2.attn")        # "layers.2.attention"
    aliases.own("layers.2.attention")            # "transformer.h.2.attn"

A key is a path, with `*` for any one name, or a class. Each module whose path ends with it gets the name where the module
stands; and where the path has several names, at the module that the path begins at too, if it means only one there. A child
whose own name is that of a point or method (`output` in BERT) has another name in any case: `output_`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .errors import PathError
from .paths import fits, spelled

Rename = Mapping[str | type, str | Sequence[str]]


class Aliases:
    """The other names in one model."""

    def __init__(self, root: torch.nn.Module, rename: Rename | None, taken: type, below: type) -> None:
        """`taken` is the class whose attributes cannot be names; at the modules `below` the root it is that one."""
        self._at: dict[str, dict[str, str]] = {}
        self._modules = dict(root.named_modules(remove_duplicate=False))
        self._taken = taken
        for key, names in (rename or {}).items():
            for name in [names] if isinstance(names, str) else names:
                self._add(key, name)
        for path in filter(None, self._modules):  # last, so that a name of the user's choice comes before `output_`
            host, _, name = path.rpartition(".")
            if hasattr(below if host else taken, name) and f"{path}_" not in self._modules:
                self._at.setdefault(host, {}).setdefault(f"{name}_", path)
        self._modules = {}

    def at(self, path: str) -> Mapping[str, str]:
        """The other names at the module of this path, each with the path of what it stands for."""
        return self._at.get(path, {})

    def own(self, path: str) -> str:
        """The model's own path of what is written as `path`, with other names in it or without."""
        if not self._at:
            return path
        found = ""
        for name in path.split(".") if path else ():
            found = self.at(found).get(name) or (f"{found}.{name}" if found else name)
        return found

    def shown(self, path: str) -> str:
        """The model's own path as it is written with the other names, the shortest way."""
        if not self._at or not path:
            return path
        *above, name = path.split(".")
        ways = [f"{self.shown('.'.join(above))}.{name}" if above else name]
        for depth in range(len(above) + 1):
            host = ".".join(above[:depth])
            ways += [f"{self.shown(host)}.{each}" if host else each for each, own in self.at(host).items() if own == path]
        return min(ways[1:] or ways, key=lambda way: way.count("."))

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Each name that was given, with what it stands for, places in a list together: `layers`, `transformer.h`."""
        seen: dict[tuple[str, str], None] = {}
        for names in self._at.values():
            for name, own in names.items():
                if name != own.rpartition(".")[2] + "_":
                    seen[_together(self.shown(own)), _together(own)] = None
        return iter(seen)

    def _add(self, key: str | type, name: str) -> None:
        """Give the modules that a key means their name."""
        if not name.isidentifier() or name.startswith("_") or hasattr(self._taken, name):
            raise PathError(
                f"`rename` cannot call {_key(key)} `{name}`: points and methods of a model are called so."
                if hasattr(self._taken, name)
                else f"`rename` cannot call {_key(key)} `{name}`: that is no name.",
                "Choose another name.",
            )
        found = [path for path, module in self._modules.items() if path and self._means(key, path, module)]
        parts = 1 if isinstance(key, type) else key.strip(".").count(".") + 1
        from_above: dict[str, list[str]] = {}
        for path in found:
            self._bind(path.rpartition(".")[0], name, path)
            if parts > 1:
                from_above.setdefault(".".join(path.split(".")[:-parts]), []).append(path)
        for host, paths in from_above.items():
            if len(paths) == 1:
                self._bind(host, name, paths[0])

    def _means(self, key: str | type, path: str, module: torch.nn.Module) -> bool:
        if isinstance(key, type):
            return isinstance(module, key)
        wanted = key.strip(".").split(".")
        return fits(path.split(".")[-len(wanted) :], wanted)

    def _bind(self, host: str, name: str, path: str) -> None:
        """Have `name` at `host` stand for the module at `path`."""
        own = f"{host}.{name}" if host else name
        if own not in self._modules and hasattr(self._modules[host], name):
            raise PathError(f"`rename` would hide `{spelled(own)}`, which `{spelled(path)}` is not.", "Choose another name.")
        there = self._at.get(host, {}).get(name, own if own in self._modules else path)
        if there != path:
            raise PathError(
                f"`rename` would call both `{spelled(there)}` and `{spelled(path)}` `{spelled(own)}`.",
                "Give them different names, or a key with a longer path.",
            )
        if own != path:
            self._at.setdefault(host, {})[name] = path


def _together(path: str) -> str:
    return ".".join("*" if name.isdigit() else name for name in path.split("."))


def _key(key: Any) -> str:
    return f"`{key.__name__}`" if isinstance(key, type) else f"`{key}`"
