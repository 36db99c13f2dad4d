"""Which point of the model is meant: `run.to(model.transformer.h[5].mlp)`, `run.to("transformer.h.5.mlp", "input")`.

envoy, kind = pointed_at(tree, "transformer.h[5].mlp", "input")
"""

from typing import Any

import torch

from ..errors import NotReachedError, PathError, RunError
from ..paths import spelled
from ..tree import Envoy, Tree
from ..visits import INPUT, OUTPUT, Kind


def pointed_at(tree: Tree, point: Any, kind: str) -> tuple[Envoy, Kind]:
    """The one module that `point` names, and the kind as it is compared: by identity."""
    if kind not in (INPUT, OUTPUT):
        raise RunError(f"A module has no {kind!r} to go to.", 'Write "input" or "output".')
    envoy = point if isinstance(point, Envoy) else _named(tree, point)
    if type(envoy._module).forward is torch.nn.Module.forward:
        module = spelled(envoy._path)
        raise NotReachedError(
            f"`{module}` holds modules and has no forward of its own, so no run comes by it.",
            f"Name one that is in it: `{module}[0]`.",
            asked=spelled(envoy._path, kind),
        )
    return envoy, INPUT if kind == INPUT else OUTPUT


def _named(tree: Tree, point: Any) -> Envoy:
    """The one module that a path, or the module itself, stands for."""
    path = point.replace("[", ".").replace("]", "") if isinstance(point, str) else point
    chosen = Envoy(tree.root, "", tree)._chosen(path)
    if len(chosen) != 1:
        raise PathError(f"`{point}` names {len(chosen)} modules.", "Name one: `transformer.h.5.mlp`.")
    ((path, module),) = chosen.items()
    return Envoy(module, path, tree)
