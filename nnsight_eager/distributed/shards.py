"""A tensor that the ranks hold in shards: put together to be read, and split to be computed on with.

    shard = Shard(dim=-1)
    whole = shard.gathered(local, ranks)        # [batch, seq, 4 * heads]
    local = shard.split(whole, ranks)           # this rank's part again

Both are differentiable. All ranks compute the same from the whole, so its gradient is the whole one on each: of a gathered
tensor each rank takes its part, and of a split one the parts are gathered.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .ranks import Ranks


class Shard(NamedTuple):
    """How a tensor is divided: along `dim`; where weights are packed, each of the `pieces` it consists of along `dim`."""

    dim: int
    pieces: int = 1

    def gathered(self, local: torch.Tensor, sizes: Sequence[int], ranks: Ranks) -> torch.Tensor:
        """The whole tensor, of which the ranks have `sizes` along the dimension."""
        return _Gathered.apply(local, self, sizes, ranks)  # type: ignore[no-any-return, no-untyped-call]

    def split(self, whole: torch.Tensor, sizes: Sequence[int], ranks: Ranks) -> torch.Tensor:
        """This rank's part of a whole tensor."""
        return _Split.apply(whole, self, sizes, ranks)  # type: ignore[no-any-return, no-untyped-call]

    def together(self, locals_: Sequence[torch.Tensor]) -> torch.Tensor:
        """The whole of every rank's part."""
        if self.pieces == 1:
            return torch.cat(tuple(locals_), self.dim)
        each = [local.chunk(self.pieces, self.dim) for local in locals_]
        return torch.cat([pieces[number] for number in range(self.pieces) for pieces in each], self.dim)

    def part(self, whole: torch.Tensor, sizes: Sequence[int], rank: int) -> torch.Tensor:
        """One rank's part, in memory of its own."""
        start, size = sum(sizes[:rank]) // self.pieces, sizes[rank] // self.pieces
        pieces = whole.chunk(self.pieces, self.dim)
        return torch.cat([piece.narrow(self.dim, start, size) for piece in pieces], self.dim)

    def sizes(self, whole: int, ranks: int) -> list[int]:
        """What each rank has of a dimension, as torch divides it: all alike, but for the last ones."""
        piece = whole // self.pieces
        most = -(-piece // ranks)
        return [self.pieces * min(most, max(0, piece - rank * most)) for rank in range(ranks)]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, shard: Shard, sizes: Sequence[int], ranks: Ranks) -> torch.Tensor:
        ctx.how = shard, sizes, ranks
        return shard.together(ranks.all_of(local.detach(), sizes, shard.dim))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        shard, sizes, ranks = ctx.how
        return shard.part(gradient, sizes, ranks.here), None, None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, shard: Shard, sizes: Sequence[int], ranks: Ranks) -> torch.Tensor:
        ctx.how = shard, sizes, ranks
        return shard.part(whole, sizes, ranks.here)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        shard, sizes, ranks = ctx.how
        return shard.together(ranks.all_of(gradient, sizes, shard.dim)), None, None, None
