"""Where torch's random numbers are: each held run goes on with its own, whatever other runs have drawn meanwhile.

now = Random.now()
now.put()                                    # the same numbers come again
with random_numbers_as_they_are(): ...       # what is drawn in here is not missing afterwards
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True, slots=True)
class Random:
    """Where torch's random numbers are: of the processor and of each accelerator in use."""

    states: list[torch.Tensor]
    left: ClassVar["Random | None"] = None
    """Where they were when a held run of any model last paused or ended."""

    @classmethod
    def now(cls) -> "Random":
        """Where they are now."""
        return cls([torch.default_generator.get_state(), *(torch.cuda.get_rng_state_all() if _cuda_in_use() else ())])

    def put(self) -> None:
        """Have them go on from here."""
        torch.default_generator.set_state(self.states[0])
        if len(self.states) > 1:  # pragma: no cover: needs CUDA
            torch.cuda.set_rng_state_all(self.states[1:])

    def same(self, other: "Random | None") -> bool:
        """Whether the same numbers come next."""
        if other is None or len(self.states) != len(other.states):
            return False
        return all(map(torch.equal, self.states, other.states))


@contextmanager
def random_numbers_as_they_are() -> Iterator[None]:
    """Have the random numbers be afterwards what they are now, whatever held runs draw in this block."""
    now, left = Random.now(), Random.left
    try:
        yield
    finally:
        now.put()
        Random.left = left


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
