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
from .packing import Form, Packed, form_of, packed, unpacked
from .pictures import pictured
from .wire import Answer, Arguments, At, Begin, Message, Writes

TORCHS_FOLDER: Final = os.path.dirname(torch.__file__)

PLAIN: Final = frozenset((type(None), bool, int, float, str))
"""Arguments that are sent rather than told of."""

StoredEdit = tuple[str, Any, tuple[Any, ...]]
"""An edit as it is sent: its label, its program, its settings."""

Refs = Callable[[Any], Any]
"""Gives what a client has a handle of, by its name."""


class Known:
    """What a client knows by number of the visit that its run is paused at, and what of it was brought."""

    __slots__ = ("_brought", "_values")

    def __init__(self) -> None:
        self._values: list[Any] = []
        self._brought: set[int] = set()

    def __getitem__(self, number: int) -> Any:
        return self._values[number]

    def number_of(self, value: Any) -> int:
        """The number of a value."""
        for number, each in enumerate(self._values):
            if each is value:
                return number
        self._values.append(value)
        return len(self._values) - 1

    def to_bring(self, number: int) -> bool:
        """Whether a value is to be brought, which is done once."""
        if number in self._brought:
            return False
        self._brought.add(number)
        return True


class ServedRun:
    """A run, the numbers its tensors have for the client, and the caches it fills."""

    def __init__(self, model: NNsight, begin: Begin, refs: Refs, paths: Paths) -> None:
        """The model call is made, and has not begun; `model` is the client's own view of it."""
        self._root = model._module
        self._refs = refs
        self._paths = paths
        self._known = Known()
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
        fork.__dict__.update(vars(earlier), _held=held, _trace=held, _known=Known(), _caches=[])
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
        self._known = Known()

    def nbytes(self, weights: frozenset[int]) -> int:
        """The memory that it holds."""
        kept = sum(cache.nbytes for cache in self._caches)
        result = nbytes(tensors(self.run._forward.result), weights) if self.run.finished else 0
        return kept + result + held_bytes(self.run, weights)

    # Verbs: what a message can say

    def _ask(self, address: Address, kind: Kind, path: str, which: Which, bring: str) -> Packed | Arguments | None:
        """On to a point, and bring what is asked for of it."""
        self.run.ask(self._module_at(address), same(kind), path, which)
        self._known = Known()
        return self._bring(bring) if bring else None

    def _listen(self, address: Address) -> None:
        owner, _, _ = address
        self.run.listen(part_of(self.run, self._root.get_submodule(owner), owner, ()))

    def _bring(self, what: str) -> Packed | Arguments:
        """What there is at the visit the run is paused at: of an output or of the first argument the first tensor.

        Further arguments are left here, each as a whole: nothing is looked for in them before they are asked for.
        """
        visit = self._paused()
        if what == OUTPUT:
            return self._packed(visit.value, first_tensor(visit.value))
        first, *others = [*visit.args, *visit.kwargs.values()] or [None]
        told = [each if type(each) in PLAIN else self._left(each) for each in others]
        brought = self._packed(first, first_tensor(first))
        return Arguments(brought, told, len(visit.args), [*visit.kwargs], visit.inputs_unchanged())

    def _rest(self, numbers: list[int]) -> Packed:
        """Values that were left here."""
        return self._packed([self._known[number] for number in numbers])

    def _packed(self, value: Any, only: torch.Tensor | None = None) -> Packed:
        """A value with its tensors, or with this one only, but for those that the client has been brought at this visit."""

        def marks(tensor: torch.Tensor) -> tuple[Hashable, bool]:
            number = self._known.number_of(tensor)
            return number, (only is None or tensor is only) and self._known.to_bring(number)

        return packed(value, marks, self._paths.name, by_value=False)

    def _left(self, value: Any) -> tuple[int, Form | str]:
        """What is told of a value that stays here."""
        return self._known.number_of(value), form_of(value) if isinstance(value, torch.Tensor) else type(value).__name__

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
        self._known = Known()
        return self.run.to_step(step)

    def _finish(self) -> None:
        self._known = Known()
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
        self._known = Known()
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
                self._known[number].copy_(unpacked(value))
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
        return self._known[name] if isinstance(name, int) else self._refs(name)

    # Inside

    def _paused(self) -> Visit:
        visit = self.run.at
        if visit is None:
            raise RunEndedError("The run is not paused at a point.", "Read a point first.")
        return visit

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
