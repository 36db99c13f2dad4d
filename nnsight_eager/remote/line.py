"""The line to a server: calls of its actor, a sign of life now and then, and what it means when there is no answer.

line = Line("llama", actor)
line.go(message)                    # an `Answer`; `Lost` where the actor has died, or does not know this client any more
line.ask("progress", job)
"""

import contextlib
import getpass
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Final

from ..errors import ServerLostError
from .cluster import ray_module
from .wire import Answer, Message, Opened, answer_meant, message_sent

PATIENCE: Final = 600.0
"""How many seconds a server may take to be there again: it has its model to load."""


class Lost(Exception):
    """The actor that a run was on is gone; `why` is what Ray says."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class Line:
    """A client's line to one server."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self._ray = ray_module()
        self._died = self._ray.exceptions.RayActorError
        self._actor = actor
        self._lock = threading.Lock()
        self._forgotten: list[tuple[str, int]] = []
        self._opened: Opened | None = None
        self._count = 0
        self._closings = 0

    @property
    def session(self) -> Opened:
        """This client as the server knows it; it is let in where it is not."""
        with self._lock:
            if self._opened is None:
                self._opened = self._ray.get(self._actor.open.remote(_owner()))
                threading.Thread(target=_beats, args=(weakref.ref(self), self._opened), daemon=True).start()
            return self._opened

    def forget_session(self) -> None:
        """The server knows this client no more: it is let in anew when it next calls."""
        self._opened = None

    def number(self) -> int:
        """A number for a run or a function, given once."""
        with self._lock:
            self._count += 1
            return self._count

    def forget(self, kind: str, number: int) -> None:
        """Have the server let something go, when it is next given a sign of life."""
        self._forgotten.append((kind, number))

    def go(self, message: Message) -> Answer:
        """Send a message; raises `Lost` where the run that it is for is lost."""
        try:
            session = self.session
            answer = self._ray.get(self._actor.go.remote(message_sent(session.session, message)))
        except self._died as error:
            raise self._lost(error) from None
        if answer is None:
            self._opened = None
            if message.begin is not None:
                return self.go(message)  # nothing is lost: the server was started anew since, and the run begins now
            raise Lost("it was started anew, and knows this client no more")
        return answer_meant(answer)

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the server that answers with what came of it, and how."""
        try:
            how, value = self._ray.get(getattr(self._actor, method).remote(self.session.session, *args))
        except self._died as error:
            raise self.lost(self._lost(error), f"what `{method}` was to do") from None
        return self.came_of(how, value, method)

    def came_of(self, how: str, value: Any, what: str) -> Any:
        """What was returned; what was raised is raised here."""
        if how == "unknown":
            self._opened = None
            raise self.lost(Lost("it was started anew, and knows this client no more"), f"what `{what}` was to do")
        if how == "raised":
            raise value
        return value

    def control(self, method: str, *args: Any) -> Any:
        """Call a method that is served however many runs there are."""
        try:
            return self._ray.get(getattr(self._actor, method).options(concurrency_group="control").remote(*args))
        except self._died as error:
            raise self.lost(self._lost(error), f"what `{method}` was to do") from None

    def ask(self, method: str, *args: Any) -> Any:
        """The same of a method that wants to know who calls."""
        return self.control(method, self._known(f"what `{method}` was to do"), *args)

    def submit(self, job: int, sent: Any) -> Any:
        """Have a function run next to the model; Ray's reference to what comes of it."""
        session = self._known("the function that was submitted")
        return self._actor.run_function.options(concurrency_group="functions").remote(session, job, sent)

    def _known(self, what: str) -> int:
        """The number of this client on the server; `what` is lost where there is none."""
        try:
            return self.session.session
        except self._died as error:
            raise self.lost(self._lost(error), what) from None

    def await_function(self, reference: Any, timeout: float | None) -> tuple[str, Any]:
        """What came of a function, and how; raises `TimeoutError`."""
        try:
            return self._ray.get(reference, timeout=timeout)  # type: ignore[no-any-return]
        except self._ray.exceptions.GetTimeoutError:
            raise TimeoutError("The function has not ended yet.") from None
        except self._died as error:
            raise self.lost(self._lost(error), "the function that was submitted") from None

    def wait_until_back(self, wanted: Callable[[], bool] = lambda: True) -> None:
        """Wait until the actor, which has died, is there again and knows this client, as long as that is `wanted`."""
        until, closings = time.monotonic() + PATIENCE, self._closings
        while True:
            try:
                _ = self.session
                return
            except self._died as error:
                gone = self._lost(error)
                over = "no_restart" in str(error) or time.monotonic() > until
                if over or self._closings != closings or not wanted():
                    raise self.lost(gone, "what this client had there") from None
                time.sleep(0.25)

    def lost(self, gone: Lost, what: str) -> ServerLostError:
        """What the loss of the actor is told with."""
        return ServerLostError(
            f"The actor `{self.name}` has died, and with it {what}. Ray says: {gone.why}.",
            "It is started anew: run this again; with `retries=1`, `model.trace(..., retries=1)`, it is repeated by itself.",
            name=self.name,
        )

    def close_run(self, run: int) -> None:
        """End a run; one that is lost has ended."""
        opened = self._opened
        if opened is not None:
            try:
                self._ray.get(self._actor.close.options(concurrency_group="control").remote(opened.session, run))
            except self._died as error:
                self._lost(error)

    def close(self) -> None:
        """Go; what this client has on the server goes with it."""
        self._closings += 1
        opened, self._opened = self._opened, None
        if opened is not None and self._ray.is_initialized():
            # It may be gone already, or hear nothing of this client any more.
            with contextlib.suppress(self._died, self._ray.exceptions.GetTimeoutError):
                self._ray.get(self._actor.leave.options(concurrency_group="control").remote(opened.session), timeout=10)

    def _lost(self, error: Exception) -> Lost:
        self._opened = None
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Lost(lines[0].rstrip(".") if lines else type(error).__name__)

    def _beat(self, opened: Opened) -> bool:
        """Give a sign of life; whether another is wanted."""
        if self._opened is not opened or not self._ray.is_initialized():
            return False
        forgotten, self._forgotten = self._forgotten, []
        beat = self._actor.beat.options(concurrency_group="control")
        try:
            known = bool(self._ray.get(beat.remote(opened.session, forgotten)))
        except self._died:
            return False
        if not known:
            self._opened = None
        return known


def _beats(line: "weakref.ref[Line]", opened: Opened) -> None:
    """Give a sign of life now and then, as long as the line is in use."""
    while True:
        time.sleep(opened.every)
        here = line()
        if here is None or not here._beat(opened):
            return
        del here


def _owner() -> str:
    """How others see who this is."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user has no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}:{os.getpid()}"
