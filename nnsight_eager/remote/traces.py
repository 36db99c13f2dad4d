"""A trace whose run is on a server.

with model.trace("The Eiffel Tower is in", retries=1) as tracer:
    hidden = model.transformer.h[5].output
    cache = tracer.cache("transformer.h.*", positions=-1)       # filled there, brought when it is looked at
"""

from collections.abc import Callable, Iterable
from os import PathLike, fspath
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ..cache import Cache, Entry, Keep
from ..errors import RemoteError
from ..invokes import Division
from ..run import Call
from ..trace import Trace
from ..tree import Envoy, Tree
from .jobs import Future
from .packing import Packed, unpacked
from .runs import RemoteRun, no_gradients

if TYPE_CHECKING:
    from .held import RemoteHeld

Begin = Callable[..., RemoteRun]
"""Makes a run of a call."""
Submit = Callable[..., Future]
"""Has a function run next to the model."""


class RemoteTrace(Trace):
    """One call of a model on a server."""

    __slots__ = ("_begin_run", "_root_envoy", "_submit", "retries")

    def __init__(
        self,
        tree: Tree,
        name: str,
        call: Call | None,
        division: Division | None,
        begin: Begin,
        root_envoy: Callable[[Tree], Envoy],
        submit: Submit,
    ) -> None:
        """`begin` makes the run, `root_envoy` the model's tree bound to it, `submit` has a function run there."""
        super().__init__(tree, name, call, division)
        self._begin_run = begin
        self._root_envoy = root_envoy
        self._submit = submit
        self.retries = 0

    def submit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future:
        """Have `function(model, *args, **kwargs)` be the block of this trace, next to the model; only what it returns travels.

            def last(model, layer):
                return model.transformer.h[layer].output[:, -1]         # [batch, hidden]

            futures = [model.trace(prompt).submit(last, 5) for prompt in prompts]
            [future.result() for future in futures]

        Functions that wait for the model, from whichever clients, share a forward pass as invokes do, each with its own rows,
        where their inputs have the same shape but for the rows and the same keywords, and no edits are stored. What each gets
        is, but for rounding, what it gets alone. One that cannot share, or that does not come to its end in a shared pass, runs
        again alone. There are no gradients: for those the function opens its own trace, `model.submit(function)`.
        """
        if self._call is None or self._call.name != "forward":
            raise RemoteError(
                "A function can be the block of a forward pass with an input: `model.trace(prompt).submit(function)`.",
                "Open generations, other methods and traces of invokes in the function: `model.submit(function)`.",
            )
        return self._submit(function, args, kwargs, self._call.kwargs, self.retries)

    def start(self, keep: bool = True) -> "RemoteHeld":  # type: ignore[override]
        """Begin the run and hold it by hand: it stays paused on the server, across cells and prompt lines."""
        from .held import RemoteHeld

        return RemoteHeld.begun(self, keep)

    def _run_of(self, call: Call, make: Any = None) -> Any:
        return self._begin_run(call, retries=self.retries)

    def _keeping(self, chosen: dict[str, torch.nn.Module], keep: Keep, named: bool) -> Cache:
        """A cache that is filled on the server: values are sliced and converted there, and brought when they are looked at."""
        run: Any = self._opened()
        number = run.cache(chosen, keep._replace(device="cpu", detach=True), named)
        return RemoteCache(run, number, self._tree.memory.aliases.own)

    def backward(self, *_: Any, **__: Any) -> NoReturn:
        """Gradients do not travel."""
        raise no_gradients()

    def _divide(self, frames: Iterable[FrameType]) -> None:
        if self._division is not None and self._division.batched:
            raise RemoteError(
                "Invokes share a forward pass, and their blocks run as it goes on, next to the model.",
                "Put the trace into a function and `model.submit` it, or write `model.trace(batched=False)`.",
            )
        super()._divide(frames)

    @property
    def model(self) -> Envoy:
        """The model's tree bound to this run."""
        if self._view is None:
            self._view = self._root_envoy(Tree(self._tree.root, self._tree.memory, self._opened()))
        return self._view


class RemoteCache(Cache):
    """A cache that is filled on a server, and brought when it is first looked at after the run has ended."""

    def __init__(self, run: RemoteRun, number: int, own: Callable[[str], str]) -> None:
        self._run = run
        self._number = number
        self._own = own
        self._brought: dict[str, list[Entry]] | None = None

    @property
    def _entries(self) -> dict[str, list[Entry]]:  # type: ignore[override]
        if self._brought is not None:
            return self._brought
        sent = self._run.ask_cache("cached", self._number)
        assert isinstance(sent, Packed)
        entries: dict[str, list[Entry]] = unpacked(sent)
        if self._run.finished:
            self._brought = entries
        return entries

    def save_there(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file, as `save` does, but on the server's side."""
        self._run.ask_cache("save_cache", self._number, fspath(path))
