"""A watcher that keeps chosen values: no pause, no switch.

    with model.trace("The Eiffel Tower") as tracer:
        cache = tracer.cache(modules=["transformer.h.*.mlp"], positions=-1)
    cache["transformer.h.0.mlp"].output
    cache.transformer.h[0].mlp.output

What is kept is a copy, made where the value is final: after all edits, sliced and converted before it is stored.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from os import PathLike, fspath
from typing import Any, Final, NamedTuple

import torch

from .errors import CacheError, RowsError, ShardError
from .folding import folded
from .nested import copied, described, first_tensor, tensors
from .paths import near, spelled
from .shown import Column, Grid, Line, Part, Shown
from .snapshots import settle, snapshot
from .summaries import one_line
from .visits import OUTPUT, Visit

SHOWN: Final = 40
"""How many lines of a cache are shown; layers of which the same was kept are one line."""

Positions = int | slice | list[int] | None


class Entry(NamedTuple):
    """One visit of a module: in which step, with what arguments, and what it returned; `None` for what is not kept."""

    step: int
    output: Any
    inputs: Any

    @property
    def input(self) -> Any:
        """The first argument."""
        args, kwargs = self.inputs if self.inputs is not None else ((), {})
        return next(iter((*args, *kwargs.values())), None)


class Keep(NamedTuple):
    """What a cache keeps, and how."""

    device: Any = "cpu"
    dtype: torch.dtype | None = None
    detach: bool = True
    output: bool = True
    inputs: bool = False
    positions: Positions = None

    def copy(self, value: Any) -> Any:
        """A copy of `value` as it is to be kept."""
        return copied(value, self._copied)

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.positions is not None and tensor.dim() == 3:
            # An index would drop the dimension; a list of one keeps it, as a slice does.
            try:
                tensor = tensor[:, [self.positions] if isinstance(self.positions, int) else self.positions]
            except IndexError:
                raise CacheError(
                    f"`positions={self.positions}` is not in {described(tensor)}, whose positions are dimension 1.",
                    "In a generation every step after the first has one position: give `-1`, or a slice.",
                ) from None
        if self.detach:
            tensor = tensor.detach()
        dtype = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
        moved = tensor.to(self.device, dtype)
        return snapshot(tensor) if moved is tensor else moved


class Cache(Shown):
    """Values by module path, in the order the modules were first visited; one entry for each visit.

    `cache["transformer.h.0"].output`, or by navigation `cache.transformer.h[0].output`; a module that was visited several
    times, as in a generation, has `.visits`. `cache.save(path)` and `Cache.load(path)` write and read a safetensors file.
    """

    def __init__(self, entries: dict[str, list[Entry]] | None = None, own: Callable[[str], str] = str) -> None:
        """`own` gives the path in the model's own names, which values are kept by, of one in other names."""
        self._entries: dict[str, list[Entry]] = {} if entries is None else entries
        self._own = own

    def watcher(self, path: str, keep: Keep, part: Callable[[Any, str], Any], *, named: bool = True) -> Callable[[Visit], None]:
        """What is called at each visit of the module at `path`; `part` narrows a value to what is to be seen of it.

        Where nobody has `named` the module, a value is left out in which nothing is to be seen, or that cannot be put together.
        """
        inputs: list[Any] = []

        def watch_unnamed(visit: Visit) -> None:
            if visit.kind is OUTPUT or keep.inputs:
                with contextlib.suppress(RowsError, ShardError):
                    keep_visit(visit)

        def keep_visit(visit: Visit) -> None:
            if visit.kind is not OUTPUT:
                if keep.inputs:
                    inputs.append(keep.copy(part((visit.args, visit.kwargs), "inputs")))
                return
            output = keep.copy(part(visit.value, OUTPUT)) if keep.output else None
            entry = Entry(visit.step, output, inputs.pop() if inputs else None)
            self._entries.setdefault(path, []).append(entry)

        return keep_visit if named else watch_unnamed

    @property
    def nbytes(self) -> int:
        """How many bytes the kept tensors take."""
        return sum(each.nbytes for each in tensors([[tuple(entry) for entry in each] for each in self._entries.values()]))

    def keys(self) -> list[str]:
        """The paths of the modules that were visited."""
        return [*self._entries]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, path: object) -> bool:
        return isinstance(path, str) and self._place(path)._path in self._entries

    def __getitem__(self, path: str) -> "Cached":
        return self._place(path)._checked()

    def __getattr__(self, name: str) -> "Cached":
        if name.startswith("_"):
            raise AttributeError(name)
        return self._place(name)._checked()

    def _place(self, path: str) -> "Cached":
        """The place at a path in any names, which may begin at `model`, as in a message or `cache.model.transformer`."""
        first, _, below = path.partition(".")
        place, in_model = Cached(self, self._own(path)), Cached(self, self._own(below))
        return in_model if first == "model" and not place._is_there() and in_model._is_there() else place

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *(path.split(".")[0] for path in self._entries if path)})

    def _parts(self) -> Iterator[Part]:
        visits = sum(map(len, self._entries.values()))
        yield Line(f"{len(self)} modules, {visits} visits, {self.nbytes / 1e6:.1f} MB", "title")
        rows = folded((path, _kept(entries[-1]), str(len(entries))) for path, entries in self._entries.items())
        columns = [Column("module"), Column("output", least=19)]
        if any(len(entries) > 1 for entries in self._entries.values()):
            columns.append(Column("visits", right=True))
        yield Grid(columns, [(path or '""', *said)[: len(columns)] for path, *said in rows[:SHOWN]])
        if len(rows) > SHOWN:
            yield Line(f"and {len(rows) - SHOWN} more lines: `cache.keys()`", "dim")

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file, whose header holds the index as JSON.

            cache.save("activations.safetensors")

        Tuples, lists and dictionaries are kept; model outputs become dictionaries. Raises `CacheError` for values that are none
        of these, such as key/value caches.
        """
        from safetensors.torch import save_file

        stored: dict[str, torch.Tensor] = {}
        index = {
            module: [_described(list(entry), stored, f"{module}[{visit}]") for visit, entry in enumerate(entries)]
            for module, entries in self._entries.items()
        }
        save_file(stored, fspath(path), {"nnsight_eager": json.dumps(index)})

    @classmethod
    def load(cls, path: str | PathLike[str], device: str = "cpu") -> "Cache":
        """Read what `save` has written."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(fspath(path), "pt", device=device) as file:
                index = json.loads((file.metadata() or {})["nnsight_eager"])
                tensor = file.get_tensor
                return cls({key: [Entry(*_restored(each, tensor)) for each in entries] for key, entries in index.items()})
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise CacheError(
                f"`{fspath(path)}` is not a cache that was saved: {error}", "Give a file that `cache.save` has written."
            ) from None


class Cached(Shown):
    """One place in a cache: a module's values, and the way to those below it."""

    def __init__(self, cache: Cache, path: str) -> None:
        self._cache = cache
        self._path = path

    @property
    def visits(self) -> list[Entry]:
        """One entry for each visit, in order."""
        entries = self._cache._entries.get(self._path)
        if entries is None:
            raise self._unknown()
        for each in tensors([tuple(entry) for entry in entries]):
            settle(each)
        return entries

    @property
    def output(self) -> Any:
        """What the module returned, in its one visit."""
        return self._only().output

    @property
    def inputs(self) -> Any:
        """What the module was called with, `(args, kwargs)`, in its one visit."""
        return self._only().inputs

    @property
    def input(self) -> Any:
        """The first argument, in its one visit."""
        return self._only().input

    @property
    def hidden(self) -> torch.Tensor | None:
        """The first tensor of the output, in its one visit."""
        return first_tensor(self._only().output)

    def _only(self) -> Entry:
        visits = self.visits
        if len(visits) > 1:
            raise CacheError(
                f"`{spelled(self._path)}` was visited {len(visits)} times.",
                f'Choose a visit, as in `cache["{self._path}"].visits[0].output`.',
            )
        return visits[0]

    def _is_there(self) -> bool:
        """Whether the cache has something of this module or of one below it."""
        entries = self._cache._entries
        return self._path in entries or any(path.startswith(self._prefix) for path in entries)

    def _checked(self) -> "Cached":
        if not self._is_there():
            raise self._unknown()
        return self

    def _unknown(self) -> CacheError:
        hint = near(self._path, self._cache.keys())
        return CacheError(
            f"The cache has nothing of `{self._path or 'model'}`{hint}", f"It holds {len(self._cache)} modules: `cache.keys()`."
        )

    def __getattr__(self, name: str) -> "Cached":
        if name.startswith("_"):
            raise AttributeError(name)
        return self._below(name)

    def __getitem__(self, key: int | str) -> "Cached":
        if isinstance(key, int) and key < 0:
            below = (path.removeprefix(self._prefix) for path in self._cache._entries if path.startswith(self._prefix))
            last = max((int(name) for path in below if (name := path.split(".")[0]).isdigit()), default=-1)
            key = last + 1 + key if last + 1 + key >= 0 else key
        return self._below(str(key))

    def _below(self, name: str) -> "Cached":
        return self._cache._place(f"{self._prefix}{name}")._checked()

    @property
    def _prefix(self) -> str:
        """How the paths of the modules below this one begin."""
        return f"{self._path}." if self._path else ""

    def __len__(self) -> int:
        """How often the module was visited."""
        return len(self._cache._entries.get(self._path, ()))

    def __bool__(self) -> bool:
        return True

    def _parts(self) -> Iterator[Part]:
        below = sum(path.startswith(self._prefix) for path in self._cache._entries) - (not self._path and len(self) > 0)
        inside = f", {below} modules below it" if below else ""
        yield Line(f"cached of {spelled(self._path)}: {len(self)} visit{'s' * (len(self) != 1)}{inside}", "title")
        entries = self._cache._entries.get(self._path, ())
        rows = [(str(each.step), one_line(first_tensor(each.output))) for each in entries[:SHOWN]]
        if rows:
            yield Grid([Column("step", right=True), Column("output", 40, broken=True)], rows)
        if len(entries) > SHOWN:
            yield Line(f"and {len(entries) - SHOWN} more", "dim")


def _kept(entry: Entry) -> str:
    """What the last visit has left, in words."""
    tensor = first_tensor(entry.output)
    return "" if tensor is None else described(tensor)


def _described(value: Any, stored: dict[str, torch.Tensor], name: str) -> Any:
    """`value` as JSON, its tensors put into `stored`."""
    if isinstance(value, torch.Tensor):
        key = f"{name}#{len(stored)}"
        stored[key] = value.contiguous()
        return {"tensor": key}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, (tuple, list)):
        return {"tuple" if isinstance(value, tuple) else "list": [_described(each, stored, name) for each in value]}
    if hasattr(value, "keys"):
        return {"dict": {str(key): _described(value[key], stored, name) for key in value.keys()}}  # noqa: SIM118 (a `ModelOutput` iterates over its keys only so)
    raise CacheError(
        f"`{name}` holds a `{type(value).__name__}`, which a file of tensors cannot keep.",
        "Leave that module out, or trace with `use_cache=False`.",
    )


def _restored(described: Any, tensor: Callable[[str], torch.Tensor]) -> Any:
    """What `_described` was given."""
    ((kind, value),) = described.items()
    if kind == "tensor":
        return tensor(value)
    if kind == "value":
        return value
    if kind == "dict":
        return {key: _restored(each, tensor) for key, each in value.items()}
    items = [_restored(each, tensor) for each in value]
    return tuple(items) if kind == "tuple" else items
