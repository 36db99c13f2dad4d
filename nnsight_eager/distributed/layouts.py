"""How the value of each point is divided among the ranks.

    layouts = Layouts(root, mesh, ranks)
    layouts.at(module, "model.layers.0.mlp.act_fn", "output", called)      # {(): Shard(dim=2)}

It is not guessed from names. The plan says how weights are divided, and they are tensors that know the shape of the whole. So a
small input is run twice: by the ranks together, and by an undivided twin of the model on fake tensors. Where a value of the one
is smaller along one dimension than that of the other, and the ranks' sizes add up to it, it is a shard along that. Where the
shapes are the same, it is whole if all ranks have the same values, which the first of the passes tells; a sum of which each
rank has a part does not pass for whole. What neither tells is not known, and is refused.

All modules are looked at in one pair of passes, an operation in a forward when it is first asked for; layers that differ by
their number only are divided alike, as they are in a plan.
"""

import contextlib
import re
from collections.abc import Hashable, Iterator, Mapping
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..aliases import Aliases
from ..ears import Memory
from ..errors import PointError, SourceError
from ..inside import Part
from ..nested import is_cache, items, mapped
from ..paths import spelled
from ..run import Call, Run
from ..scan import fake_call
from ..visits import OUTPUT, Kind, Visit
from .ranks import Ranks
from .shards import Shard
from .twin import undivided

Place = tuple[Any, ...]
"""Where a tensor is in a value: the keys that lead to it."""


class Untold(NamedTuple):
    """What is known of a tensor that is neither whole nor a shard, or not known to be: in words."""

    why: str


How = Shard | Untold | None
"""How one tensor is divided; `None` where it is whole."""

Layout = Mapping[Place, How]

DIMENSIONS: Final = 8
"""As many as the shape of a tensor may have that is compared between ranks."""


MASK: Final = "attention_mask"


class Called(NamedTuple):
    """What the root was called with, and whether gradients were on: libraries then compute in another way."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad: bool


class Seen(NamedTuple):
    """One tensor in a pass: its shape, and what tells its values from others."""

    shape: torch.Size
    values: list[float]


Point = tuple[str, Kind, int]
"""The path of a module or a part, its inputs or its output, and which of its visits in the pass."""


class Layouts:
    """What has been found out about the points of one model."""

    def __init__(self, root: torch.nn.Module, mesh: DeviceMesh, ranks: Ranks) -> None:
        self._root = root
        self._ranks = ranks
        # Of half precision first: the fake form of torch's grouped product (2.13) has no other.
        self._twins = [undivided(root, torch.bfloat16), undivided(root, None)]
        self._packed = [*_packed(root, mesh)]
        self._elsewhere = [*_divided_elsewhere(root, mesh)]
        self._known: dict[Hashable, Layout] = {}
        self._passes: set[Hashable] = set()
        self._in_caches: dict[Place, How] = {}

    def at(self, module: torch.nn.Module, path: str, kind: Kind, called: Called) -> Layout:
        """The layout of a point's value; every rank asks at the same time. What the small pass leaves out is not in it."""
        key, part = self._key(module, path, kind, called), module if isinstance(module, Part) else None
        learned = key if part is not None else _way(called)
        if key not in self._known and learned not in self._passes:
            self._ranks.agree(f"`{spelled(path, kind)}`, whose layout is not known yet")
            self._learn(part, kind, called)
            self._passes.add(learned)
        return self._known.get(key, {})

    def in_cache(self, place: Place) -> How:
        """How the tensor at a place in a key/value cache is divided, whatever the cache is in."""
        return self._in_caches.get(place, Untold("nothing like it was met when the layout was looked at"))

    def _key(self, module: torch.nn.Module, path: str, kind: Kind, called: Called) -> Hashable:
        if isinstance(module, Part):
            return re.sub(r"\.\d+(?=\.)", ".*", path), type(module.owner), kind, _way(called)
        return path, kind, _way(called)

    def _learn(self, part: Part | None, kind: Kind, called: Called) -> None:
        """Run the two passes and compare what they have come by."""
        call = self._small(called)
        here = _pass(self._root, Call("forward", self._root, call.args, call.kwargs), part, kind, call.grad)
        whole = self._undivided(call, part, kind)
        table = [(point, place, seen) for point, each in here.items() for place, seen in each.items()]
        rows = self._compared([seen for *_, seen in table])
        found: dict[tuple[str, Kind], dict[Place, How]] = {point[:2]: {} for point in here}
        for number, (point, place, _) in enumerate(table):
            like = None if whole is None else whole.get(point, {}).get(place)
            how = self._how(point[0], rows[:, number], like, whole is not None)
            if found[point[:2]].setdefault(place, how) != how:
                how = Untold("it is divided in different ways at its visits in one pass")
            found[point[:2]][place] = how
            if (suffix := _in_cache(place)) is not None:
                self._in_caches[suffix] = how
        for (path, each_kind), layout in found.items():
            module = part if part is not None else self._root
            self._known[self._key(module, path, each_kind, called)] = layout

    def _small(self, called: Called) -> Called:
        """What the passes are run with: the library's own example, else what the model was called with, and the same flags."""
        example = getattr(self._root, "dummy_inputs", None)
        if not isinstance(example, Mapping):
            args, kwargs = mapped((called.args, called.kwargs), lambda tensor: tensor.detach().clone())
            return Called(args, kwargs, called.grad)
        device = next(self._root.parameters()).device
        given = {name: each.to(device) if isinstance(each, torch.Tensor) else each for name, each in example.items()}
        ids = given.get("input_ids")
        if ids is not None and MASK in _given(called):  # else nothing would be known of it where it is met
            given.setdefault(MASK, torch.ones_like(ids))
        return Called((), {**given, **_flags(called)}, called.grad)

    def _undivided(self, call: Called, part: Part | None, kind: Kind) -> dict[Point, dict[Place, Seen]] | None:
        """What the twin comes by; `None` where it cannot run on fake tensors."""
        for twin in self._twins:
            with contextlib.suppress(Exception), FakeTensorMode(allow_non_fake_inputs=True) as mode:
                like = None if part is None else part.of(twin.get_submodule(_path_of(part.owner, self._root)))
                return _pass(twin, fake_call(mode, twin, Call("forward", twin, call.args, call.kwargs)), like, kind, call.grad)
        return None  # it does something that needs values

    def _compared(self, seen: list[Seen]) -> torch.Tensor:
        """For every rank and every tensor its shape and what tells its values: `[ranks, tensors, ...]`."""
        rows = [[*each.shape, *[-1] * (DIMENSIONS - len(each.shape)), *each.values] for each in seen]
        own = torch.tensor(rows, dtype=torch.float64, device="cpu").reshape(len(rows), DIMENSIONS + 3)
        return self._ranks.rows_of(own.to(next(self._root.parameters()).device)).cpu()

    def _how(self, path: str, rows: torch.Tensor, like: Seen | None, twin: bool) -> How:
        """What the ranks' rows about one tensor, and the one that the twin has there, tell of it."""
        shapes, values = rows[:, :DIMENSIONS].long(), rows[:, DIMENSIONS:]
        same = bool((shapes == shapes[0]).all()) and torch.allclose(values, values[:1].expand_as(values), 1e-3, 1e-6, True)
        if any(path.startswith(f"{scope}.") for scope in self._elsewhere):
            return Untold("the module around it is divided in another way than the model, as experts are among ranks")
        if like is None:
            return None if same and not twin else Untold("an undivided model does not come by it")
        ends = shapes == -1
        whole = torch.tensor([*like.shape, *[-1] * (DIMENSIONS - len(like.shape))])
        if bool((ends != (whole == -1)).any()):
            return Untold("it has another number of dimensions than in an undivided model")
        divided = (shapes != whole).any(0).nonzero().flatten().tolist()
        if not divided:
            return None if same else Untold("each rank has values of its own in it, in the shape of the whole")
        if len(divided) > 1 or int(shapes[:, divided[0]].sum()) != int(whole[divided[0]]):
            return Untold("the ranks' shapes do not add up to that of an undivided model")
        return self._divided(path, divided[0], int(shapes[self._ranks.here, divided[0]]))

    def _divided(self, path: str, dim: int, size: int) -> How:
        """A shard, which may be one of packed weights: these are told by their size."""
        for scope, length, pieces in self._packed:
            if path == scope or path.startswith(f"{scope}."):
                if size * pieces == length:
                    return Shard(dim)
                return Shard(dim, pieces) if size == length else Untold("weights are packed in this module")
        return Shard(dim)


def _pass(root: torch.nn.Module, call: Call, part: Part | None, kind: Kind, grad: bool) -> dict[Point, dict[Place, Seen]]:
    """Run the model on the small input, and note what there is at one part, or at every module."""
    memory = Memory(Aliases(root, None, object, object))
    memory.alone = True
    seen: dict[Point, dict[Place, Seen]] = {}
    with torch.set_grad_enabled(grad), torch.random.fork_rng(enabled=root.training):
        run = Run(root, call, memory)
        try:
            if part is not None:
                seen[part.path, kind, 1] = _asked(run, part, kind)
                return seen
            for path, module in root.named_modules():
                run.watch(module, partial(_note, seen, path))
            run.finish()
        finally:
            run.close()
    return seen


def _asked(run: Run, part: Part, kind: Kind) -> dict[Place, Seen]:
    """What there is at a part; nothing where the run does not come by it."""
    try:
        visit = run.ask(part, kind, part.path)
    except (PointError, SourceError):
        return {}
    return _seen(visit.value if kind is OUTPUT else (visit.args, visit.kwargs))


def _note(seen: dict[Point, dict[Place, Seen]], path: str, visit: Visit) -> None:
    """The watcher of a module in a pass: what each of its visits has."""
    seen[path, visit.kind, visit.times] = _seen(visit.value if visit.kind is OUTPUT else (visit.args, visit.kwargs))


def _seen(value: Any) -> dict[Place, Seen]:
    return {place: Seen(tensor.shape, told(tensor)) for place, tensor in placed(value)}


def told(tensor: torch.Tensor) -> list[float]:
    """Three numbers by which the values of two tensors differ, where they do."""
    if isinstance(tensor, (FakeTensor, DTensor)) or tensor.is_complex() or tensor.device.type == "meta":
        return [0.0] * 3
    numbers = tensor.detach().double().flatten()
    ramp = torch.linspace(1, 2, len(numbers), dtype=numbers.dtype, device=numbers.device)
    return [float(numbers.sum()), float(numbers.abs().sum()), float((numbers * ramp).sum())]


def placed(value: Any, place: Place = ()) -> Iterator[tuple[Place, torch.Tensor]]:
    """Every tensor in a value, with its place."""
    if isinstance(value, torch.Tensor):
        yield place, value
    for key, item in () if isinstance(value, torch.Tensor) else items(value):
        yield from placed(item, (*place, *((CACHE,) if is_cache(value) else ()), key))


CACHE: Final = "(cache)"
"""Stands in a place before a key in a key/value cache, which is laid out alike wherever it is met."""


def _in_cache(place: Place) -> Place | None:
    """The part of a place that is in a cache."""
    return place[place.index(CACHE) :] if CACHE in place else None


def how_at(layouts: Layouts, layout: Layout, place: Place) -> How:
    """How the tensor at a place in a value of this layout is divided."""
    if place in layout:
        return layout[place]
    suffix = _in_cache(place)
    return layouts.in_cache(suffix) if suffix is not None else Untold("nothing like it was met when the layout was looked at")


def _flags(called: Called) -> dict[str, Any]:
    """The keywords that choose what a model computes, and are no data."""
    return {key: each for key, each in called.kwargs.items() if isinstance(each, (bool, int, str))}


def _given(called: Called) -> set[str]:
    """The keywords that are data."""
    return {key for key, each in called.kwargs.items() if isinstance(each, torch.Tensor)}


def _way(called: Called) -> Hashable:
    """What tells apart calls that a model may compute in ways of their own."""
    return called.grad, MASK in _given(called), tuple(sorted(_flags(called).items()))


def _path_of(module: torch.nn.Module, root: torch.nn.Module) -> str:
    path: str = next(path for path, each in root.named_modules() if each is module)
    return path


def _divided_elsewhere(root: torch.nn.Module, mesh: DeviceMesh) -> Iterator[str]:
    """The modules whose weights are divided among the ranks of another mesh: what such a one computes on is not the whole."""
    for name, weight in root.named_parameters():
        if isinstance(weight, DTensor) and mesh.mesh_dim_names is not None:
            names = weight.device_mesh.mesh_dim_names
            if names is not None and not set(mesh.mesh_dim_names) & set(names):
                yield name.rpartition(".")[0]


def _packed(root: torch.nn.Module, mesh: DeviceMesh) -> Iterator[tuple[str, int, int]]:
    """Where packed weights are computed with: the path of a module, their local length, and how many are packed."""
    for name, weight in root.named_parameters():
        divided = weight if isinstance(weight, DTensor) else None
        for number, placement in enumerate(divided.placements if divided is not None else ()):
            pieces = getattr(placement, "split_factor", 1)
            if divided is not None and pieces > 1 and _is_along(divided.device_mesh, number, mesh):
                path = name.rpartition(".")[0]
                linear = isinstance(root.get_submodule(path), torch.nn.Linear)  # what it gives goes on in the module around it
                length = divided.shape[getattr(placement, "dim", 0)] // divided.device_mesh.size(number)
                yield path.rpartition(".")[0] if linear else path, length, pieces


def _is_along(whole: DeviceMesh, number: int, mesh: DeviceMesh) -> bool:
    """Whether a dimension of a mesh is that of `mesh`: FSDP too divides in pieces, and puts them together again."""
    return whole.mesh_dim_names is None or mesh.mesh_dim_names is None or whole.mesh_dim_names[number] in mesh.mesh_dim_names
