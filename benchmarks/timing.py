"""How long ways of doing the same work take, and how much memory they need.

medians({"bare": bare, "plain hooks": hooks}, rounds=100)       # {"bare": 5.1e-05, "plain hooks": 8.8e-05}: seconds
memory(hooks)                                                  # Memory(peak=..., kept=...): bytes
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch

Way = Callable[[], object]
Ways = dict[str, Way]
Clock = Callable[[], float]


class Seconds(float):
    """What a way returns that has measured itself: a process, without its start."""


class Memory(NamedTuple):
    """Bytes that torch has allocated: at most, while a way ran, and what its answer holds."""

    peak: int
    kept: int


def medians(ways: Ways, rounds: int, twice: bool = True, clock: Clock = time.process_time) -> dict[str, float]:
    """The median time of each way in seconds: of the processor, or by another clock.

    Every round runs each way in random order, so that a slow moment of the machine hits all of them, and `twice`, of which the
    second is timed: a way does not pay for what the one before has left. The processor's time is what the work takes where
    others are at work on the machine too; it does not count waiting for a disk.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways.items())
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name, way in order:
            if twice:
                way()
            start = clock()
            answer = way()
            spent = clock() - start
            times[name].append(answer if isinstance(answer, Seconds) else spent)
            del answer
    return {name: statistics.median(each) for name, each in times.items()}


def memory(way: Way) -> Memory:
    """What a way needs, from torch's own record of what was allocated and freed; the same each time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        answer = way()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    now = peak = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    return Memory(peak, sum({address(each): each.untyped_storage().nbytes() for each in tensors_in(answer)}.values()))


def address(tensor: torch.Tensor) -> int:
    """Where its memory begins: the same of a view, and of a copy that nobody has written yet."""
    return torch._C._data_address(tensor) - tensor.storage_offset() * tensor.element_size()


def tensors_in(value: Any, met: set[int] | None = None) -> Iterator[torch.Tensor]:
    """The tensors in what a way returns, whatever it is of; a model in it is not the answer's."""
    met = set() if met is None else met
    if id(value) in met or isinstance(value, (torch.nn.Module, type, FunctionType, MethodType)):
        return
    met.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    for each in (*parts, *getattr(value, "__dict__", {}).values()):
        yield from tensors_in(each, met)
