"""Which point of the model is meant: `run.to(model.transformer.h[5].mlp)`, `run.to("transformer.h.5.mlp", "input")`.

pointed_at(run, tree, "transformer.h[5].mlp", "input")
pointed_at(run, tree, model.transformer.h[5].attn, "pattern")        # a part of the attention's forward
pointed_at(run, tree, model.transformer.h[5].source.self_mlp_0)      # as is an operation
"""

from typing import Any, NamedTuple

import torch

from ..errors import NotReachedError, PathError, RunError
from ..paths import PATTERN, dotted, matching, spelled
from ..run import Run
from ..source import OperationPoint, part_of
from ..tree import Envoy, Tree
from ..visits import INPUT, OUTPUT, Kind


class Pointed(NamedTuple):
    """A module, or a part of its forward, how that is written, and the kind as it is compared: by identity."""

    module: torch.nn.Module
    path: str
    kind: Kind


def pointed_at(run: Run, tree: Tree, point: Any, kind: str = OUTPUT) -> Pointed:
    """The one module or part that `point` names; as text it may end as it is shown: `model.h[2].mlp.input`."""
    if isinstance(point, str):
        point, kind = _without_kind(tree.root, point, kind)
    if kind not in (INPUT, OUTPUT, PATTERN):
        raise RunError(f"A module has no {kind!r} to go to.", 'Write "input", "output" or "pattern".')
    side: Kind = INPUT if kind == INPUT else OUTPUT
    if isinstance(point, OperationPoint):
        part = part_of(run, point._owner, point._owner_path, point._names)
        return Pointed(part, point._path, side)
    names: list[str] = []
    if isinstance(point, str):
        point, *names = _divided(tree.root, point)
    envoy = point if isinstance(point, Envoy) else _named(tree, point)
    if names:
        part = part_of(run, envoy._module, envoy._path, tuple(names))
        return Pointed(part, part.path, side)
    if kind == PATTERN:
        return Pointed(*envoy._pattern(run), side)
    if type(envoy._module).forward is torch.nn.Module.forward:
        module = spelled(envoy._path)
        raise NotReachedError(
            f"`{module}` holds modules and has no forward of its own, so no run comes by it.",
            f"Name one that is in it: `{module}[0]`.",
            asked=spelled(envoy._path, kind),
        )
    return Pointed(envoy._module, envoy._path, side)


def _without_kind(root: torch.nn.Module, path: str, kind: str) -> tuple[str, str]:
    """A path less the name of the point that it ends with, and that point; a child of such a name is a module."""
    owner, _, last = path.rpartition(".")
    if not owner or last not in (INPUT, OUTPUT, PATTERN):
        return path, kind
    is_module = any(matching(root, each) for each in (dotted(path), dotted(path).removeprefix("model.")))
    return (path, kind) if is_module else (owner, last)


def _divided(root: torch.nn.Module, path: str) -> list[str]:
    """The path of a module and the names of an operation in it, if it names one: `h.0.source.self_mlp_0`."""
    path = dotted(path)
    if path in dict(root.named_modules()):
        return [path]
    owner, *names = f".{path}".split(".source.")  # the root's own operations begin at `source`
    return [owner.removeprefix("."), *names]


def _named(tree: Tree, point: Any) -> Envoy:
    """The one module that a path, or the module itself, stands for."""
    chosen = {"": tree.root} if point == "" else Envoy(tree.root, "", tree)._chosen(point)
    if len(chosen) != 1:
        first = tree.memory.aliases.shown(next(filter(None, chosen), ""))
        raise PathError(f"`{point}` names {len(chosen)} modules.", f"Name one: `{first}`." if first else "Name one.")
    ((path, module),) = chosen.items()
    return Envoy(module, path, tree)
