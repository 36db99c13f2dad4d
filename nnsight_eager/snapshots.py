"""Keep what a tensor holds now; nothing is copied before somebody writes.

kept = snapshot(hidden)      # takes no memory and, whatever the size, a microsecond
hidden *= 0                  # torch copies here, and `kept` has what was there
"""

import threading
from typing import Final

import torch

_lock: Final = threading.Lock()


def snapshot(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor.clone()`, put off until the tensor, the copy or a view of one is written (torch's copy-on-write storages).

    Copied at once: part of a larger tensor, which would keep all of it; a module's own parameter, which is to stay where it
    is; and what is quantized, empty, or not plain memory of this process. What writes past torch is not noticed: numpy, in an
    array that it had of the tensor before. As long as the memory is shared (torch 2.13), a tensor is not made larger in place,
    and threads take turns at writing one tensor, also at different places of it.
    """
    if type(tensor) is torch.Tensor and tensor.is_cpu and not tensor.is_quantized:  # whose scale is not copied
        try:
            if tensor.untyped_storage().nbytes() == tensor.nbytes > 0:
                return torch._lazy_clone(tensor)
        except RuntimeError:  # sparse, mapped from a file, batched by `vmap`
            pass
    return tensor.clone()


def settle(tensor: torch.Tensor) -> None:
    """Have a copy be made that was put off: what is handed out may be used by several threads."""
    if tensor.layout is torch.strided and torch._C._is_cow_tensor(tensor):  # type: ignore[attr-defined]
        with _lock:
            tensor.data_ptr()  # whoever asks for it may write
