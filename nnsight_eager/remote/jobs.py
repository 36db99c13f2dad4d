"""A function that runs next to the model, and what is known of it here.

future = model.submit(function, prompts)         # on the server `function(model, prompts)` is called; its trace is local
future.progress                                  # (3, 10, "prompts"), where the function says `report(3, 10, "prompts")`
future.result(timeout=60)
"""

import contextlib
import sys
import sysconfig
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

from ..errors import ServerLostError
from .line import Line
from .packing import Packed, unpacked


class Progress(NamedTuple):
    """How far a function has come."""

    done: int
    total: int
    what: str

    def __str__(self) -> str:
        return f"{self.done:,} of {self.total:,} {self.what}".rstrip()


class Future:
    """What will come of a function that was submitted."""

    def __init__(self, line: Line, sent: Packed, name: str, retries: int = 0) -> None:
        """Have the function run; where the server dies, from its start once more, as often as `retries` says."""
        self._line = line
        self._sent = sent
        self._name = name
        self._retries = retries
        self._last = Progress(0, 0, "")
        self._outcome: tuple[str, Any] | None = None
        self._anew: threading.Thread | None = None
        """Submits the function once more, while the server is not there."""
        self._submit()

    def _submit(self) -> None:
        self._job = self._line.number()
        self._reference = self._line.submit(self._job, self._sent)

    def result(self, timeout: float | None = None) -> Any:
        """What the function returns, with what it raises raised here; `TimeoutError` where that takes longer, in seconds."""
        how, value = self._awaited(timeout)
        return unpacked(self._line.came_of(how, value, self._name))

    def done(self) -> bool:
        """Whether the function has ended."""
        with contextlib.suppress(TimeoutError):
            self._awaited(0)
        return self._outcome is not None

    @property
    def progress(self) -> Progress:
        """How far the function has come, as it says itself."""
        if not self.done() and self._anew is None:
            with contextlib.suppress(ServerLostError):  # which `result` will tell, or repeat
                found = Progress(*self._line.ask("progress", self._job))
                self._last = found if found.total else self._last
        return self._last

    def cancel(self) -> None:
        """Have the function end when it next lets the model go on or says how far it has come; `result` then raises."""
        self._line.ask("cancel", self._job)

    def _awaited(self, timeout: float | None) -> tuple[str, Any]:
        """What has come of it, and how; raises `TimeoutError` after so many seconds, however often it was begun anew."""
        until = None if timeout is None else time.monotonic() + timeout
        while self._outcome is None:
            left = None if until is None else max(0.0, until - time.monotonic())
            if self._anew is not None:
                self._anew.join(left)
                if self._anew.is_alive():
                    raise TimeoutError("The function has not ended yet: it waits for its server to be there again.")
                self._anew = None
                continue
            try:
                how, value = self._line.await_function(self._reference, left)
            except ServerLostError as lost:
                if self._retries:
                    self._retries -= 1
                    self._begin_anew(self._line.wait_until_back)
                else:
                    self._outcome = "raised", lost
                continue
            if how == "unknown":  # the server was started anew before the function came there
                self._begin_anew(lambda _: self._line.forget_session())
            else:
                self._outcome = how, value
        return self._outcome

    def _begin_anew(self, first: Callable[[Callable[[], bool]], None]) -> None:
        """Submit the function once more after `first`, on a thread: whoever only looks does not wait for a server."""
        self._anew = threading.Thread(target=_submit_after, args=(first, weakref.ref(self)), daemon=True)
        self._anew.start()

    def __repr__(self) -> str:
        return f"<{self._name} on {self._line.name}: {'done' if self.done() else self.progress}>"


def _submit_after(first: Callable[[Callable[[], bool]], None], future: "weakref.ref[Future]") -> None:
    """Submit a function once more, unless nobody has its future any more; `first` is told whether somebody does."""
    try:
        first(lambda: future() is not None)
        error = None
    except Exception as raised:
        error = raised
    this = future()
    if this is None:
        return
    try:
        if error is not None:
            raise error
        this._submit()
    except Exception as raised:
        this._outcome = "raised", raised


@contextmanager
def by_value(function: Any) -> Iterator[None]:
    """Have what is pickled in this block take the function's own module along, where the server cannot import it."""
    from ray import cloudpickle

    module = sys.modules.get(getattr(function, "__module__", None) or "")
    if module is None or module.__name__ == "__main__" or _is_installed(module):
        yield
        return
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def _is_installed(module: ModuleType) -> bool:
    """Whether a module belongs to Python, to an installed package or to this one."""
    file = getattr(module, "__file__", None)
    ours = module.__name__.split(".")[0] == __name__.split(".")[0]
    return file is None or ours or "site-packages" in file or file.startswith(sysconfig.get_paths()["stdlib"])
