"""A thread on which runs live, since a paused forward pass can go on only on the thread that began it.

    lanes = Lanes()
    lane = lanes.take()
    lane.do(run.ask, layer)        # on the lane's own thread; what it returns or raises comes back here
    lanes.give(lane)               # no run lives there any more: it serves the next

Each run has one of its own, which its forks share. So torch's settings, which are of a thread, are of one run, a run that waits
for its turn holds up no other, and Ray's own threads can come and go. A lane costs what an idle thread costs.
"""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import torch

Job = tuple[Callable[..., Any], tuple[Any, ...], "SimpleQueue[tuple[bool, Any]]"]


class Lane:
    """One thread that does what it is told, one thing after another."""

    def __init__(self) -> None:
        self.runs = 0
        """How many runs live here."""
        self._jobs: SimpleQueue[Job] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="nnsight_eager lane", daemon=True)
        self._thread.start()

    def do(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function` on the lane's thread, and wait for it."""
        answer: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
        self._jobs.put((function, args, answer))
        done, value = answer.get()
        if done:
            return value
        raise value

    def _work(self) -> None:
        torch.set_grad_enabled(False)  # gradients do not travel: a graph would be memory that nobody can use
        while True:
            function, args, answer = self._jobs.get()
            try:
                answer.put((True, function(*args)))
            except BaseException as error:
                answer.put((False, error))
            del function, args, answer  # nothing of it is kept while the lane is idle


class Lanes:
    """The lanes of a server."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Lane] = []

    def take(self) -> Lane:
        """A lane on which nothing lives."""
        with self._lock:
            return self._idle.pop() if self._idle else Lane()

    def give(self, lane: Lane) -> None:
        """Nothing lives there any more."""
        with self._lock:
            self._idle.append(lane)
