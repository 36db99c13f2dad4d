"""How much memory a paused run holds.

    held_bytes(run, weights)         # activations and inputs on its paused stack, each piece of memory once

A forward pass that is paused holds what its frames still need: the residual stream, the inputs of the modules in progress, the
key/value cache. That is found by looking at the local names of the frames, from the innermost out.
"""

from collections.abc import Iterable
from types import FrameType

import torch

from ..nested import tensors
from ..run import Run


def held_bytes(run: Run, weights: frozenset[int]) -> int:
    """The bytes that a paused run holds; `weights` are the pieces of memory that the model has anyway."""
    return nbytes(_on_stack(run._forward.frame), weights)


def nbytes(values: Iterable[torch.Tensor], without: frozenset[int] = frozenset()) -> int:
    """The memory of tensors, each piece counted once, however many see it."""
    pieces: dict[int, int] = {}
    for each in map(_here, values):
        if each.layout is torch.strided and each.device.type != "meta":
            storage = each.untyped_storage()
            pieces[storage.data_ptr()] = storage.nbytes()
    return sum(size for place, size in pieces.items() if place not in without)


def weights_of(model: torch.nn.Module) -> frozenset[int]:
    """The pieces of memory of a model's parameters and buffers."""
    named = (*model.parameters(), *model.buffers())
    return frozenset(_here(each).untyped_storage().data_ptr() for each in named if each.device.type != "meta")


def _here(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor itself, or of a `DTensor`, which has no memory of its own, this rank's part."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _on_stack(frame: FrameType | None) -> Iterable[torch.Tensor]:
    """The tensors in the local names of a paused frame and of those that called it."""
    while frame is not None:
        for value in frame.f_locals.values():
            yield from tensors(value)
        frame = frame.f_back
