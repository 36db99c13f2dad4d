"""Programs that share a run: each goes on until it asks for something that is not there yet.

body = Body(function, 'invoke 1 ("The Eiffel Tower")')
body.resume()                                   # until it waits, or ends
body.ready()                                    # whether what it waits for is there
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .batching import Rows
from .coroutine import Coroutine, current_stack, inside_forward
from .errors import EditError, RunError
from .nested import tensors
from .visits import Kind, Visit


class Awaited(NamedTuple):
    """What a body waits for from the model: the next pause at a visit, a step, or (neither) the end."""

    visit: Visit | None = None
    kind: Kind = "output"
    further: bool = False
    step: int | None = None
    since: int = 0  # how often the model had paused when this was asked


class Body(Coroutine):
    """One invoke's program, which runs on a stack of its own."""

    __slots__ = ("_lent", "_ready", "_refusal", "awaited", "beyond", "label", "rows", "waits_for")

    def __init__(self, function: Callable[[], Any], label: str) -> None:
        """It begins with the torch settings in force here, at its first `resume`."""
        super().__init__(function)
        self.label = label
        self.rows: Rows | None = None  # `None`: all rows
        self.awaited: Awaited | None = None
        self.beyond = False  # whether it has asked for a step that did not come
        self.waits_for = ""
        self._ready: Callable[[], bool] = lambda: True
        self._refusal: BaseException | None = None
        self._lent: dict[int, tuple[weakref.ref[torch.Tensor], int, str]] = {}

    @property
    def running(self) -> bool:
        """Whether this is called from the body."""
        return not self.finished and current_stack() is self.stack

    def ready(self) -> bool:
        """Whether the body can go on."""
        return self._refusal is not None or self._ready()

    def wait(self, ready: Callable[[], bool], waits_for: str, awaited: Awaited | None = None) -> None:
        """On the body's stack: pause until `ready`; `waits_for` says in words what is waited for."""
        if ready():
            return
        if not self.running:
            raise inside_forward()
        self.check_lent()
        self._ready, self.waits_for, self.awaited = ready, waits_for, awaited
        try:
            self.pause(None)
        finally:
            self._ready, self.waits_for, self.awaited = lambda: True, "", None
            if self._lent:
                self._note_versions()
        refusal, self._refusal = self._refusal, None
        if refusal is not None:
            try:
                raise refusal
            finally:
                del refusal

    def refuse(self, error: BaseException) -> None:
        """Have `error` raised at the line where the body waits, when it is resumed next."""
        self._refusal = error

    def lend(self, value: Any, point: str) -> None:
        """Note what was given to read only: tensors that all invokes share."""
        for each in tensors(value):
            if not each.is_inference():
                self._lent[id(each)] = weakref.ref(each), each._version, point

    def check_lent(self) -> None:
        """Raise where the body has changed in place what it shares with the other invokes."""
        for reference, version, point in self._lent.values():
            tensor = reference()
            if tensor is not None and tensor._version != version:
                self._note_versions()
                raise EditError(
                    f"`{point}` was changed in place in {self.label}, and all invokes share it.",
                    "Change a copy (`.clone()`), or change it in an invoke that sees all rows: `with tracer.invoke():`.",
                )

    def _note_versions(self) -> None:
        """What has changed until now is not this body's doing; what nobody holds any more is forgotten."""
        living = [(tensor, point) for reference, _, point in self._lent.values() if (tensor := reference()) is not None]
        self._lent = {id(tensor): (weakref.ref(tensor), tensor._version, point) for tensor, point in living}


class Barrier:
    """A place where several invokes wait for each other: `barrier = tracer.barrier(2)`, then `barrier()` in two of them."""

    def __init__(self, parties: int, running: Callable[[], Body | None]) -> None:
        """`running` gives the body that is running, or nothing where invokes run one by one."""
        if parties < 1:
            raise RunError(f"`tracer.barrier({parties})` waits for nobody.", "Give the number of invokes that call it.")
        self.parties = parties
        self._running = running
        self._waiting: list[Body] = []
        self._met = 0

    def __call__(self) -> None:
        """Wait until as many invokes as the barrier has parties have come here; then it can be used again."""
        body = self._running()
        if body is None:
            return
        self._waiting.append(body)
        if len(self._waiting) >= self.parties:
            self._waiting, self._met = [], self._met + 1
            return
        meeting = self._met
        missing = f"`tracer.barrier({self.parties})`, at which {self.parties} invokes have to meet"
        body.wait(lambda: self._met > meeting, missing)

    def __repr__(self) -> str:
        return f"tracer.barrier({self.parties}): {len(self._waiting)} waiting"
