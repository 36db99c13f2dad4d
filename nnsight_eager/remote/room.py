"""Memory of this process for what has come from another: Ray's own can only be read.

torch.frombuffer(copy_of(memory), dtype=torch.float32)         # a tensor that may be changed in place

Fresh memory costs more than copying to it: a fault for each of its pages, 4096 of them for 16 MB. Huge pages need 8.
"""

import contextlib
import mmap
from typing import Any, Final

HUGE: Final = 2 * 2**20
"""The size of a huge page; there is no use in one for less."""


def copy_of(memory: Any) -> Any:
    """The bytes, in memory that may be written."""
    view = memoryview(memory).cast("B")
    if view.nbytes < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return bytearray(view)
    room = mmap.mmap(-1, view.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        room.madvise(mmap.MADV_HUGEPAGE)
    room[:] = view
    return room
