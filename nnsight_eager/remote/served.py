"""One run on the server: the model's forward pass goes on as far as the client asks, and is paused in between.

    served = ServedRun(model, begin, edits)
    served.do(Message(...))                      # an `Answer`

All of it happens on the run's own lane.
"""

import os
import traceback
from collections.abc import Callable, Hashable
from types import TracebackType
from typing import Any, Final

import torch

from ..attention import pattern_of
from ..cache import Cache, Keep
from ..coroutine import OUR_FOLDER
from ..current import leave
from ..edits import Edit
from ..errors import RemoteError, RunEndedError
from ..interactive.held import HeldRun
from ..interactive.random_numbers import Random
from ..model import NNsight
from ..nested import first_tensor, tensors
from ..run import Call, Run
from ..source import part_of
from ..trace import Trace
from ..visits import OUTPUT, Kind, Visit, Which
from .addresses import Address, Paths, same
from .holding import held_bytes, nbytes
from .packing import Packed, packed, unpacked
from .pictures import pictured
from .wire import Answer, At, Begin, Message, Writes

TORCHS_FOLDER: Final = os.path.dirname(torch.__file__)

StoredEdit = tuple[str, Any, tuple[Any, ...]]
"""An edit as it is sent: its label, its program, its settings."""

Refs = Callable[[Any], Any]
"""Gives what a client has a handle of, by its name."""


class ServedRun:
    """A run, the numbers its tensors have for the client, and the caches it fills."""

    def __init__(self, model: NNsight, begin: Begin, refs: Refs, paths: Paths) -> None:
        """The model call is made, and has not begun; `model` is the client's own view of it."""
        self._root = model._module
        self._refs = refs
        self._paths = paths
        self._there: list[torch.Tensor] = []  # of the visit it is paused at, by the number the client knows them by
        self._caches: list[Cache] = []
        self._random = _seeded(begin.seed)
        self._held: HeldRun | None = None
        view = model._view()
        if begin.edits is not None:
            store(view, unpacked(begin.edits, there=refs))
        trace = Trace(view._tree, begin.name, self._call(model, begin), None)
        if begin.by_hand is None:
            trace.__enter__()
            self._trace = trace
        else:
            self._trace = self._held = trace.start(begin.by_hand)

    @classmethod
    def of(cls, earlier: "ServedRun", held: HeldRun) -> "ServedRun":
        """A fork of a run that is held by hand."""
        fork = cls.__new__(cls)
        fork.__dict__.update(vars(earlier), _held=held, _trace=held, _there=[], _caches=[])
        return fork

    def _call(self, model: NNsight, begin: Begin) -> Call:
        """The call, its tensors where the model is."""
        args, kwargs = unpacked(begin.inputs, device=device_of(self._root), there=self._refs)
        function = self._root if begin.name == "forward" else getattr(self._root, begin.name)
        return Call(begin.name, function, args, kwargs)

    @property
    def by_hand(self) -> bool:
        """Whether the run can be gone back in, also after its end."""
        return self._held is not None

    @property
    def run(self) -> Run:
        """The run itself, which going back exchanges."""
        run = self._trace._run
        assert run is not None
        return run

    def do(self, message: Message) -> Answer:
        """Do what a message says; what goes wrong is in the answer."""
        value, error = None, None
        try:
            with self._random:
                for verb, args in message.before:
                    getattr(self, f"_{verb}")(*args)
                if message.writes is not None:
                    self._write(message.writes)
                value = getattr(self, f"_{message.verb}")(*message.args)
        except Exception as raised:
            error = told(raised)
        return Answer(self.at(), value, error)

    def at(self) -> At:
        """Where the run is."""
        run = self.run
        visit = run.at
        if visit is None:
            return At(None, "", 0, False, run.step, run.begun, run.finished or not run.open)
        return At(self._paths.address(visit.module), visit.kind, visit.times, visit.skipped, run.step, True, run.finished)

    def close(self) -> None:
        """Abandon the run."""
        run = self.run
        leave(run)
        run.close()
        self._there = []

    def nbytes(self, weights: frozenset[int]) -> int:
        """The memory that it holds."""
        kept = sum(cache.nbytes for cache in self._caches)
        result = nbytes(tensors(self.run._forward.result), weights) if self.run.finished else 0
        return kept + result + held_bytes(self.run, weights)

    # Verbs: what a message can say

    def _ask(self, address: Address, kind: Kind, path: str, which: Which, bring: str) -> Packed | None:
        """On to a point, and bring what is asked for of it."""
        self.run.ask(self._module_at(address), same(kind), path, which)
        self._there = []
        return self._bring(bring) if bring else None

    def _listen(self, address: Address) -> None:
        owner, _, _ = address
        self.run.listen(part_of(self.run, self._root.get_submodule(owner), owner, ()))

    def _bring(self, what: str) -> Packed:
        """What there is at the visit the run is paused at: the first tensor, or with `all` every one."""
        visit = self._paused()
        first = first_tensor(visit.value if what.startswith(OUTPUT) else (visit.args, visit.kwargs))
        every = what.endswith("all")

        def marks(tensor: torch.Tensor) -> tuple[Hashable, bool]:
            return self._number(tensor), every or tensor is first

        if what.startswith(OUTPUT):
            return packed(visit.value, marks, self._paths.name, by_value=False)
        return packed((visit.args, visit.kwargs, visit.inputs_unchanged()), marks, self._paths.name, by_value=False)

    def _rest(self, numbers: list[int]) -> list[Packed]:
        """Tensors that were left here."""
        return [packed(self._there[number], lambda _, number=number: (number, True)) for number in numbers]  # type: ignore[misc]

    def _value(self, kind: Kind) -> Any:
        """What is paused at, itself, for a handle."""
        visit = self._paused()
        first = first_tensor(visit.value if kind == OUTPUT else (visit.args, visit.kwargs))
        if first is None:
            raise RemoteError("There is no tensor here, and a handle is of a tensor.")
        return first.detach()

    def _going_on(self, address: Address) -> bool:
        """Whether a call of the module is in progress."""
        return self.run._ears.at(self._module_at(address)).going_on

    def _to_step(self, step: int) -> bool:
        self._there = []
        return self.run.to_step(step)

    def _finish(self) -> None:
        self._there = []
        run = self.run
        run.finish()
        leave(run)
        run.close()

    def _result(self) -> Packed:
        self._finish_if_open()
        return packed(self.run.result, by_value=False)

    def _set_result(self, value: Packed) -> None:
        self._finish_if_open()
        self.run._forward.result = unpacked(value, device=device_of(self._root), there=self._refs)

    def _finish_if_open(self) -> None:
        if self.run.open:
            self._finish()

    def _cache(self, paths: list[str], keep: Keep, named: bool) -> None:
        """Keep what modules return from here on."""
        cache = Cache()
        self._caches.append(cache)
        for path in paths:
            self.run.watch(self._root.get_submodule(path), cache.watcher(path, keep, self.run.view(path), named=named))

    def _cached(self, number: int) -> Packed:
        """What a cache has."""
        return packed(self._caches[number]._entries, by_value=False)

    def _save_cache(self, number: int, path: str) -> None:
        """Write what a cache has to a file on this side."""
        self._caches[number].save(path)

    # A run that is held by hand

    def _nothing(self) -> None:
        """The run has begun, and that is all."""

    def _by_hand(self, name: str, *args: Any) -> None:
        """One of the calls that lead it somewhere."""
        self._there = []
        assert self._held is not None
        getattr(self._held, name)(*map(same, args))

    def _look(self, name: str, *args: Any) -> Any:
        """Something that is looked at, as it is shown."""
        return pictured(getattr(self._held, name)(*args) if name != "edits" else self._held.edits)  # type: ignore[union-attr]

    def _rows(self, path: str) -> Any:
        """The modules at and below a path, with what has run."""
        assert self._held is not None
        return self._held._rows(path)

    def _local(self, name: str) -> Packed:
        """The value of a local name of the model's own frame."""
        assert self._held is not None
        return packed(self._held.locals()[name], places=self._paths.name)

    def _fork(self, _: int) -> HeldRun:
        assert self._held is not None
        return self._held.fork()

    # Changes

    def _write(self, writes: Writes) -> None:
        """Change what the run is paused at, as the client has changed its copy."""
        visit = self._paused()
        for number, value in writes.changed:
            with torch.no_grad():
                self._there[number].copy_(unpacked(value))
        if writes.replaced is None:
            return
        kind, sent = writes.replaced
        value = unpacked(sent, device=device_of(self._root), there=self._there_or_ref)
        if kind == "skip":
            self.run.leave_out(visit, value)
        elif kind == "inputs":
            visit.args, visit.kwargs = value
        else:
            visit.value = value

    def _there_or_ref(self, name: Any) -> Any:
        """A tensor that the client has read here, or that it has a handle of."""
        return self._there[name] if isinstance(name, int) else self._refs(name)

    # Inside

    def _paused(self) -> Visit:
        visit = self.run.at
        if visit is None:
            raise RunEndedError("The run is not paused at a point.", "Read a point first.")
        return visit

    def _number(self, tensor: torch.Tensor) -> int:
        """The number of a tensor of this visit."""
        for number, each in enumerate(self._there):
            if each is tensor:
                return number
        self._there.append(tensor)
        return len(self._there) - 1

    def _module_at(self, address: Address) -> torch.nn.Module:
        """The module or the part of one that is asked for."""
        path, part, names = address
        module = self._paths.module(path)
        if part == "source":
            return part_of(self.run, module, path, names)
        if part == "pattern":
            owner = module
            return self.run.part((id(owner), "pattern"), lambda: pattern_of(owner, path))
        return module


def store(model: NNsight, edits: list[StoredEdit]) -> None:
    """Have every run of `model` begin with these edits."""
    for label, program, settings in edits:
        Edit(model._tree.edits).store(label, program, settings, gives=None)


def device_of(module: torch.nn.Module) -> torch.device:
    """Where inputs go."""
    return next((each.device for each in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def told(error: Exception) -> Exception:
    """An error as it is to travel: with the model's own lines as a note, since frames do not."""
    lines = [
        each for each in traceback.extract_tb(error.__traceback__) if not each.filename.startswith((OUR_FOLDER, TORCHS_FOLDER))
    ]
    if lines:
        where = "".join(traceback.format_list(lines[-3:])).rstrip()
        error.add_note(f"Where the model runs, innermost last:\n{where}")
    return error.with_traceback(None)


class _Untouched:
    """Random numbers of a run that draws none of its own."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: TracebackType | None) -> None: ...


class _Own:
    """Random numbers of one run, whoever else draws in between."""

    def __init__(self, seed: int) -> None:
        others = Random.now()
        torch.manual_seed(seed)
        self._own = Random.now()
        others.put()

    def __enter__(self) -> None:
        self._others = Random.now()
        self._own.put()

    def __exit__(self, kind: Any, error: Any, trace: TracebackType | None) -> None:
        self._own = Random.now()
        self._others.put()


def _seeded(seed: int | None) -> _Untouched | _Own:
    return _Untouched() if seed is None else _Own(seed)
