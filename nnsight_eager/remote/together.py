"""The actors of a model that is divided among ranks: each has its part of the weights, and rank 0 is the one that is served.

    python -m nnsight_eager serve meta-llama/Llama-3.1-70B --name llama --tp 4

Rank 0 makes the other actors and is made anew by Ray where it dies; they end with it, and it ends with any of them, since none
can go on without the others. So for a client they are one actor.
"""

import threading
from typing import Any

from . import cluster
from .ranks import First, Follower, join
from .serving import Server
from .sessions import Limits


class FirstRank(Server):
    """Rank 0, whose values are whole where clients see them."""

    def __init__(
        self,
        name_or_folder: str,
        name: str,
        options: dict[str, Any],
        limits: Limits,
        size: int,
        cpus: float,
        gpus: float,
        folder: str,
    ) -> None:
        """Make the other ranks, and load this one's part of the model while they load theirs; they meet in a `folder`."""
        meeting = cluster.meeting_place(folder)
        given = name_or_folder, name, options, limits._replace(memory=None), size, meeting
        others = [cluster.companion(OtherRank, (*given, rank), cpus, gpus) for rank in range(1, size)]
        join(0, size, meeting)
        ranks = First(others, cluster.done_by, cluster.end_here)
        super().__init__(name_or_folder, name, {**options, "tp_plan": "auto"}, limits, ranks)
        between = self._stand_together()
        ranks.broken = lambda: between.broken
        cluster.end_with([each.hold.remote() for each in others])


class OtherRank(Server):
    """Another rank, which does what rank 0 does."""

    _ranks: Follower

    def __init__(
        self, name_or_folder: str, name: str, options: dict[str, Any], limits: Limits, size: int, meeting: str, rank: int
    ) -> None:
        """Load its part of the model."""
        join(rank, size, meeting)
        super().__init__(name_or_folder, name, {**options, "tp_plan": "auto"}, limits, Follower())
        self._stand_together()

    def follow(self, call: int, method: str, args: tuple[Any, ...]) -> None:
        """Do what rank 0 does, which answers for all."""
        with self._ranks.following(call):
            getattr(self, method)(*args)

    def turn_is_of(self, number: int, call: int) -> None:
        """Rank 0 has given this turn to a call."""
        self._ranks.turns.turn_is_of(number, call)

    def call_has_ended(self, call: int, last: int) -> None:
        """A call takes no more turns on rank 0."""
        self._ranks.turns.call_has_ended(call, last)

    def hold(self) -> None:
        """Return never: whoever waits for it is told when this process dies."""
        threading.Event().wait()
