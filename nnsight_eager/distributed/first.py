"""Which of the processes that run one model together this is."""

import torch.distributed as dist


def is_distributed() -> bool:
    """Whether this process is one of several that torch knows of."""
    return dist.is_available() and dist.is_initialized()


class OneOfRanks:
    """Something that every rank has, and of which rank 0 does what is to be done once."""

    __slots__ = ()

    @property
    def rank0(self) -> bool:
        """Whether this is rank 0, or the only process.

        hidden = model.layers[5].output        # on every rank
        if tracer.rank0:
            print(hidden.norm())
        """
        return not is_distributed() or dist.get_rank() == 0
