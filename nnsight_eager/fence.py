"""The machine-code frame at which stack unwinding stops.

A torch error builds a C++ backtrace by walking the machine stack. Below the first frame of a greenlet lies whatever the
stack held when the greenlet was made, and glibc's unwinder reads it and dies (seen with torch 2.13, greenlet 3.5,
CPython 3.11). An unwinder stops cleanly at a frame that has no unwind information, so every coroutine's first function is
called through a few bytes of machine code that have none.
"""

import ctypes
import mmap
import platform
import struct
import sys
from collections.abc import Callable
from typing import Any

PROT_READ, PROT_EXEC = 1, 4


def _x86_64(target: int) -> bytes:
    """push rbp; mov rbp, rsp; mov rax, target; call rax; pop rbp; ret."""
    return b"\x55\x48\x89\xe5\x48\xb8" + struct.pack("<Q", target) + b"\xff\xd0\x5d\xc3"


def _aarch64(target: int) -> bytes:
    """Save the frame; ldr x16, target; blr x16; restore; ret; then the address itself."""
    code = struct.pack("<6I", 0xA9BF7BFD, 0x910003FD, 0x58000090, 0xD63F0200, 0xA8C17BFD, 0xD65F03C0)
    return code + struct.pack("<Q", target)


ASSEMBLERS = {"x86_64": _x86_64, "aarch64": _aarch64}


def call_plainly(function: Callable[[], Any]) -> Any:
    """Call `function`: what a platform gets for which no fence is known to be needed."""
    return function()


def build_fence() -> Callable[[Callable[[], Any]], Any]:
    """A callable that calls its argument below a frame without unwind information."""
    assemble = ASSEMBLERS.get(platform.machine())
    if assemble is None or sys.platform != "linux":
        return call_plainly
    target = ctypes.cast(ctypes.pythonapi.PyObject_CallNoArgs, ctypes.c_void_p).value
    assert target is not None
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    page.write(assemble(target))
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    # Never writable and executable at once: hardened kernels refuse such a page.
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), PROT_READ | PROT_EXEC):
        return call_plainly
    call = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(address)
    call.page = page  # type: ignore[attr-defined]  # the code lives as long as what calls it
    return call


fenced = build_fence()
