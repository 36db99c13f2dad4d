"""The fence: an error raised on a coroutine's stack does not kill the process."""

import os
import signal
import struct
import subprocess
import sys
import textwrap

import pytest

from nnsight_eager import fence

TARGET = 0x1122334455667788

# One at a time they share a stack, begun deep; many that are paused at once have a stack each, begun at a depth of its own.
ERRORS_AT_RANDOM_DEPTHS = """
    import random, sys
    import torch
    from nnsight_eager import coroutine

    if sys.argv[1] == "unfenced":
        coroutine.fenced = lambda function: function()

    random = random.Random(0)

    def below(c_frames, act):
        if not c_frames:
            return act()
        sorted([0], key=lambda _: below(c_frames - 1, act) or 0)

    def a_coroutine():
        def work():
            a_coroutine.pause(None)
            torch.ones(2, 3) @ torch.ones(2, 3)

        a_coroutine = coroutine.Coroutine(work)
        below(random.randrange(200), a_coroutine.resume)
        return a_coroutine

    def go_on(a_coroutine):
        try:
            a_coroutine.resume()
        except RuntimeError as error:
            raised.append(str(error))

    raised = []
    for at_once in [1] * 1_000 + [50] * 20:
        paused = [a_coroutine() for _ in range(at_once)]
        random.shuffle(paused)
        for each in paused:
            below(random.randrange(3), lambda: go_on(each))
    assert all("mat1 and mat2 shapes" in message for message in raised)
    print(len(raised), flush=True)
"""


def run_in_a_process(how: str) -> subprocess.CompletedProcess[str]:
    code = textwrap.dedent(ERRORS_AT_RANDOM_DEPTHS)
    environment = {**os.environ, "COVERAGE_PROCESS_CONFIG": ""}  # what lies on the stacks decides, and coverage's is there too
    return subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, timeout=240, env=environment)


def test_two_thousand_torch_errors_on_stacks_of_any_depth_leave_the_process_alive():
    done = run_in_a_process("fenced")
    assert (done.returncode, done.stdout.strip()) == (0, "2000"), done.stderr


@pytest.mark.skipif(fence.fenced is fence.call_plainly, reason="this platform needs no fence")
def test_without_the_fence_the_same_errors_kill_the_process():
    assert run_in_a_process("unfenced").returncode in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS)


def test_the_fence_gives_back_what_its_function_returns():
    answer = object()
    assert fence.fenced(lambda: answer) is answer


def test_an_exception_crosses_the_fence_unchanged():
    error = KeyboardInterrupt("mine")

    def work():
        raise error

    with pytest.raises(KeyboardInterrupt) as raised:
        fence.fenced(work)
    assert raised.value is error


def test_what_the_fence_calls_and_returns_keeps_its_reference_count():
    answer = object()

    def work():
        return answer

    before = sys.getrefcount(answer), sys.getrefcount(work)
    for _ in range(100):
        fence.fenced(work)
    assert (sys.getrefcount(answer), sys.getrefcount(work)) == before


@pytest.mark.parametrize("machine", sorted(fence.ASSEMBLERS))
def test_the_code_holds_the_address_once_and_nothing_else_that_depends_on_it(machine):
    code, other = (fence.ASSEMBLERS[machine](target) for target in (TARGET, ~TARGET % 2**64))
    literal = struct.pack("<Q", TARGET)
    assert code.count(literal) == 1
    at = code.index(literal)
    assert (code[:at], code[at + 8 :]) == (other[:at], other[at + 8 :])


def test_the_code_for_aarch64_loads_the_address_that_stands_behind_it():
    """Checked once with a disassembler: stp x29, x30; mov x29, sp; ldr x16, #0x18; blr x16; ldp x29, x30; ret."""
    code = fence.ASSEMBLERS["aarch64"](TARGET)
    assert len(code) == 6 * 4 + 8
    instructions = struct.unpack("<6I", code[:24])
    load = next(i for i, word in enumerate(instructions) if word >> 24 == 0x58)  # LDR Xt, label
    label = load * 4 + (instructions[load] >> 5 & 0x7FFFF) * 4
    assert label % 8 == 0
    assert struct.unpack_from("<Q", code, label) == (TARGET,)
    register = instructions[load] & 0x1F
    assert instructions[load + 1] == 0xD63F0000 | register << 5  # BLR Xn: calls what was loaded
    assert register not in range(19, 31)  # the caller's
    assert instructions[-1] == 0xD65F03C0  # RET
    save, restore = instructions[0], instructions[-2]
    assert save & 0x7FFF == restore & 0x7FFF == 31 << 5 | 29 | 30 << 10  # x29 and x30, at sp


def test_on_a_platform_without_a_fence_the_function_is_called_plainly(monkeypatch):
    monkeypatch.setattr(fence.platform, "machine", lambda: "riscv64")
    assert fence.build_fence()(lambda: "called") == "called"
    assert fence.build_fence() is fence.call_plainly


def test_where_the_kernel_refuses_the_page_the_function_is_called_plainly(monkeypatch):
    class Hardened:
        def __init__(self, _):
            self.mprotect = lambda *_: -1

    monkeypatch.setattr(fence.ctypes, "CDLL", Hardened)
    assert fence.build_fence() is fence.call_plainly
