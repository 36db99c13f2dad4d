"""One value at a pause: as the ranks hold it, in shards, and as whoever asks sees it, whole.

    shown = Shown(value, how, ranks, "`model.layers[0].mlp.act_fn.output`")
    shown.now                    # whole; it may be changed, in place or by another in its place
    shown.back()                 # what this rank goes on with

A value in which nothing is divided is handed out as it is. A shard nobody has changed is gone on with as it is, except where it
has a gradient: then the model goes on with the part of the whole, so that what was read is upstream of what follows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate

from ..errors import EditError, ShardError
from ..nested import as_where_made, described, is_cache, items, tensors, with_items
from .layouts import CACHE, How, Place, Untold, placed
from .ranks import Ranks
from .shards import Shard

Divided = Callable[[Place], How]
"""Tells how the tensor at a place in the value is divided."""


class Piece:
    """One tensor that is divided: this rank's part, and the whole that was handed out."""

    def __init__(self, local: torch.Tensor, whole: torch.Tensor, split: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.local = local
        self.whole = whole
        self._split = split
        self._versions = _version(local), _version(whole)

    @property
    def is_stale(self) -> bool:
        """Whether this rank's part was changed after the whole was put together."""
        return _version(self.local) != self._versions[0]

    def require_fit(self, now: Any, point: str) -> None:
        """Refuse what could not be divided as the whole is."""
        if not isinstance(now, torch.Tensor) or now.shape != self.whole.shape:
            raise EditError(
                f"{point} was given {described(now)}; it is {described(self.whole)}, of which each rank has a part.",
                "Give a tensor of the shape of the whole, or this rank's part: `layer.local.output = ...`.",
            )

    def back(self, now: torch.Tensor) -> torch.Tensor:
        """What this rank goes on with where `now` is in the place of the whole."""
        if now is not self.whole:
            return self._split_as_made(now)
        if _version(self.whole) != self._versions[1] or (self.whole.is_inference() and self._differs()):
            part = self._split_as_made(self.whole)
            if part.requires_grad or self.local.requires_grad:  # torch refuses to change what a function of ours has given
                return part
            with as_where_made(self.local, part):  # in place too: what shares its memory changes as in one process
                return self.local.copy_(part)
        return self._split_as_made(self.whole) if self.whole.requires_grad else self.local

    def _split_as_made(self, whole: torch.Tensor) -> torch.Tensor:
        with as_where_made(self.local, whole):
            return self._split(whole)

    def _differs(self) -> bool:
        return not torch.equal(self._split_as_made(self.whole), self.local)


class Shown:
    """One value, of which some tensors are divided."""

    def __init__(self, value: Any, divided: Divided, ranks: Ranks, point: str) -> None:
        """Every rank makes it at the same time; `point` is how the value is written."""
        self._value = value
        self._point = point
        self._pieces: dict[Place, Piece] = {}
        for place, tensor in placed(value):
            how = AS_DTENSOR if isinstance(tensor, DTensor) else divided(place)
            if isinstance(how, Shard) and how.dim >= tensor.dim():
                how = Untold("it has fewer dimensions than when its layout was looked at")
            if isinstance(how, Untold):
                raise untold(point, how)
            if how is not None:
                self._pieces[place] = piece_of(tensor, how, ranks, point)
            elif _is_fixed(tensor):
                self._pieces[place] = Piece(tensor, tensor.clone(), _itself)
        self.now = _rebuilt(value, {place: piece.whole for place, piece in self._pieces.items()}) if self._pieces else value
        self._given = self.now
        self._versions = [(each, _version(each)) for each in tensors(self.now)]

    @property
    def is_stale(self) -> bool:
        """Whether it has to be put together again: this rank's part has changed, and nothing else."""
        return self.now is self._given and any(piece.is_stale for piece in self._pieces.values())

    def edited(self) -> list[torch.Tensor]:
        """The whole tensors that were changed, or stand in the place of others."""
        if self.now is not self._given:
            before = {id(each) for each in tensors(self._given)}
            new = [each for each in tensors(self.now) if id(each) not in before]
        else:
            new = []
        return new + [each for each, version in self._versions if _version(each) != version]

    def replace(self, now: Any) -> None:
        """Have `now` be in the place of the whole value; refused where it could not be divided."""
        self._require_fit((), self._value, now)
        self.now = now

    def _require_fit(self, place: Place, value: Any, now: Any) -> None:
        piece = self._pieces.get(place)
        if piece is not None:
            piece.require_fit(now, self._point)
        elif now is not value and not isinstance(value, torch.Tensor) and self._divides(place):
            old, new = items(value), dict(items(now))
            if type(value) is not type(now) or [key for key, _ in old] != [*new]:
                raise EditError(
                    f"{self._point} was given {described(now)} in the place of {described(value)}, parts of which are shards.",
                    "Give a value of the same form, or this rank's: `layer.local.output = ...`.",
                )
            for key, item in old:
                self._require_fit(_below(place, value, key), item, new[key])

    def back(self) -> Any:
        """What this rank goes on with; the value itself where nothing has changed."""
        if not self._pieces:
            return self.now
        self._require_fit((), self._value, self.now)  # once more: a list or a cache may have been changed since
        return self._back((), self._value, self.now)

    def _back(self, place: Place, value: Any, now: Any) -> Any:
        piece = self._pieces.get(place)
        if piece is not None:
            return piece.back(now)
        if now is value or isinstance(value, torch.Tensor) or not self._divides(place):
            return now
        new = dict(items(now))
        changes = {
            key: done
            for key, item in items(value)
            if (done := self._back(_below(place, value, key), item, new[key])) is not item
        }
        if not is_cache(value):
            return with_items(value, changes)
        vars(value).update(changes)
        return value

    def _divides(self, place: Place) -> bool:
        return any(each[: len(place)] == place for each in self._pieces)


def parts_of(whole: Any, divided: Divided, ranks: Ranks, point: str) -> Any:
    """This rank's part of a value that no rank has computed: the output given for a call that is left out."""
    parts = {}
    for place, tensor in placed(whole):
        how = divided(place)
        if isinstance(how, Untold):
            raise untold(point, how)
        if how is not None and not isinstance(tensor, DTensor):
            parts[place] = how.split(tensor, how.sizes(tensor.shape[how.dim], len(ranks)), ranks)
    return _rebuilt(whole, parts)


def untold(point: str, how: Untold) -> ShardError:
    """The error for a value that cannot be put together."""
    return ShardError(
        f"How {point} is divided among the ranks cannot be told: {how.why}.",
        "Read what this rank holds, and put it together as it is meant: `.local` before the point, `layer.local.output`.",
        asked=point.strip("`"),
    )


AS_DTENSOR = Shard(-1, 0)
"""Stands for what a `DTensor` says itself."""


def piece_of(tensor: torch.Tensor, how: Shard, ranks: Ranks, point: str) -> Piece:
    """A tensor and the whole of it; every rank does this at the same time."""
    if isinstance(tensor, DTensor):
        ranks.agree(f"all of {point}")
        mesh, placements = tensor.device_mesh, tensor.placements
        with as_where_made(tensor):
            whole = tensor.full_tensor()
        everywhere = [Replicate()] * mesh.ndim
        return Piece(tensor, whole, lambda new: DTensor.from_local(new, mesh, everywhere).redistribute(placements=placements))
    sizes: Sequence[int] = ranks.agree(f"all of {point}", tensor.shape[how.dim])
    with as_where_made(tensor):
        whole = how.gathered(tensor, sizes, ranks)
    return Piece(tensor, whole, lambda new: how.split(new, sizes, ranks))


def _is_fixed(tensor: torch.Tensor) -> bool:
    """Whether torch refuses to change a tensor in place that it would let one change in one process.

    A `DTensor` that has become a plain tensor again is a view that a function of Python's has made.
    """
    return tensor.requires_grad and tensor._is_view() and isinstance(tensor.grad_fn, torch.autograd.function.BackwardCFunction)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _rebuilt(value: Any, new: dict[Place, torch.Tensor], place: Place = ()) -> Any:
    """`value` with other tensors at these places; nothing given is changed."""
    if place in new:
        return new[place]
    if isinstance(value, torch.Tensor) or not any(each[: len(place)] == place for each in new):
        return value
    done = {key: (item, _rebuilt(item, new, _below(place, value, key))) for key, item in items(value)}
    return with_items(value, {key: now for key, (old, now) in done.items() if now is not old})


def _below(place: Place, value: Any, key: Any) -> Place:
    """The place of an item of the value at a place."""
    return (*place, CACHE, key) if is_cache(value) else (*place, key)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
