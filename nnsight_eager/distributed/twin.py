"""The same model undivided, on the meta device: the shapes that its values have where one process runs it.

twin = undivided(model)        # no weights, no hooks, no division

A weight that is divided is a `DTensor`, which knows the shape of the whole. What a library has put in front of a forward to
divide it stands in the module's own `forward`, or is a hook; a twin has neither.
"""

import copy
from collections import OrderedDict
from typing import Any

import torch


def undivided(root: torch.nn.Module, dtype: torch.dtype | None) -> torch.nn.Module:
    """The twin of a model, with weights of this type, or of their own."""
    if _divides_experts(root):  # the library then writes into the experts how many this rank has
        config = copy.deepcopy(root.config)
        with torch.device("meta"):
            twin = type(root)._from_config(config).train(root.training)  # type: ignore[attr-defined]
    else:
        twin = _copied(root, {})
    for weight in twin.parameters() if dtype is not None else ():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)
    return twin  # type: ignore[no-any-return]


def _divides_experts(root: torch.nn.Module) -> bool:
    divided = getattr(getattr(root, "config", None), "distributed_config", None)
    return getattr(divided, "ep_size", 1) > 1 and hasattr(type(root), "_from_config")


def _copied(module: torch.nn.Module, done: dict[int, torch.nn.Module]) -> torch.nn.Module:
    """A module with weights of the whole's shape and the same attributes; one that has several names stays one."""
    if id(module) in done:
        return done[id(module)]
    twin = done[id(module)] = object.__new__(type(module))
    own = {name: OrderedDict() if name.endswith("_hooks") else value for name, value in vars(module).items()}
    own.pop("forward", None)
    own["_parameters"] = {name: _weight(each) for name, each in module._parameters.items()}
    own["_buffers"] = {name: None if each is None else _on_meta(each) for name, each in module._buffers.items()}
    own["_modules"] = {
        name: None if each is None else _copied(each, done) for name, each in module._modules.items()
    }  # fmt: skip
    twin.__dict__.update(own)
    return twin


def _weight(weight: torch.nn.Parameter | None) -> Any:
    return None if weight is None else torch.nn.Parameter(_on_meta(weight), requires_grad=weight.requires_grad)


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
