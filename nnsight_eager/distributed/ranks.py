"""The processes that run one model together, and the short messages by which they keep to the same points.

    ranks = Ranks(mesh.get_group())
    ranks.agree("`model.layers[0].output`")        # returns when every rank has said the same; else says who said what
    ranks.all_of(shard)                            # every rank's tensor, in order

A collective that one rank issues and another does not hangs until a time limit of many minutes, and says nothing then. So
before each one the ranks tell each other what for, over a connection of their own that gives up early.
"""

import hashlib
import math
import os
import struct
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist

from ..errors import RanksError

BYTES: Final = 480
"""As much of a message as is sent; the rest counts by its hash."""


def patience() -> float:
    """For how many seconds a rank waits for the others to say what they ask for: `NNSIGHT_EAGER_RANKS_TIMEOUT`, else 20."""
    return float(os.environ.get("NNSIGHT_EAGER_RANKS_TIMEOUT", "20"))


class Ranks:
    """The ranks of one group, as this one of them sees them."""

    def __init__(self, group: Any) -> None:
        """Every rank of `group` has to make one at the same time."""
        self._group = group
        self.numbers: list[int] = dist.get_process_group_ranks(group)
        self.here: int = self.numbers.index(dist.get_rank())
        self._limit = patience()
        self.broken = False
        """Whether a rank has not said in time what it asks for: then nothing can be heard of it any more."""
        # Of gloo whatever the model computes on: it gives up at its time limit and leaves the process alive.
        self._words = dist.new_group(
            self.numbers, timeout=timedelta(seconds=self._limit), backend="gloo", use_local_synchronization=True
        )

    def __len__(self) -> int:
        return len(self.numbers)

    def agree(self, asked: str, number: int = 0, values: float = 0.0) -> list[int]:
        """Return when every rank has said that this is what it asks for; what each has given as its `number`.

        `values` tells the values of its edits so far from others.
        """
        words = asked.encode()
        said = struct.pack("<qd", number, values) + hashlib.sha256(words).digest()[:16] + words[:BYTES].ljust(BYTES, b"\0")
        own = torch.tensor(list(said), dtype=torch.uint8, device="cpu")
        heard = [torch.empty_like(own) for _ in self.numbers]
        try:
            dist.all_gather(heard, own, group=self._words)
        except RuntimeError as error:
            self.broken = True
            raise RanksError(
                f"Rank {self.numbers[self.here]} asks for {asked}, and another rank has not said within {self._limit:g} "
                f"seconds what it asks for, or is gone ({str(error).strip().splitlines()[0][:120]}).",
                "Every rank has to run the same script to its end; `NNSIGHT_EAGER_RANKS_TIMEOUT` gives them more seconds.",
                asked={self.numbers[self.here]: asked},
            ) from None
        messages = [bytes(each.tolist()) for each in heard]
        numbers, every = zip(*(struct.unpack_from("<qd", each) for each in messages), strict=True)
        if any(each[16:] != messages[0][16:] for each in messages):
            raise self._disagreement([each[32:].rstrip(b"\0").decode(errors="ignore") for each in messages])
        if not all(math.isclose(each, every[0], rel_tol=1e-6) or each != each for each in every):
            raise RanksError(
                f"The ranks of this model have made edits with different values before they ask for {asked}.",
                "Every rank has to make the same edit: seed random numbers alike on all, `torch.manual_seed(0)`.",
                asked=dict.fromkeys(self.numbers, asked),
            )
        return list(numbers)

    def _disagreement(self, asked: Sequence[str]) -> RanksError:
        by_rank = dict(zip(self.numbers, asked, strict=True))
        who = "; ".join(f"rank {rank} asks for {words}" for rank, words in by_rank.items())
        return RanksError(
            f"The ranks of this model have to ask for the same points in the same order: {who}.",
            "Run the same script on every rank: read above `if tracer.rank0:`, and print below it what was read.",
            asked=by_rank,
        )

    def all_of(self, shard: torch.Tensor, sizes: Sequence[int], dim: int) -> list[torch.Tensor]:
        """Every rank's `shard`, which along `dim` has a size of its own on each."""
        shape, largest = [*shard.shape], max(sizes)
        shape[dim] = largest
        padded = shard if shard.shape[dim] == largest else _padded(shard, largest, dim)
        # As bytes: not every backend knows every type.
        own = padded.contiguous().flatten().view(torch.uint8)
        heard = [torch.empty_like(own) for _ in self.numbers]
        dist.all_gather(heard, own, group=self._group)
        whole = [each.view(shard.dtype).view(shape) for each in heard]
        return [each.narrow(dim, 0, size) for each, size in zip(whole, sizes, strict=True)]

    def rows_of(self, own: torch.Tensor) -> torch.Tensor:
        """What each rank has as a tensor of one shape, stacked."""
        return torch.stack(self.all_of(own, [own.shape[0]] * len(self), 0))


def _padded(shard: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    shape = [*shard.shape]
    shape[dim] = size - shard.shape[dim]
    return torch.cat((shard, shard.new_zeros(shape)), dim)
