"""The soak, in a short form, and that it sees what it looks for."""

import io

import faults
import pytest
import soak
from rich.console import Console

from nnsight_eager.run import Run

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def run(*arguments):
    """Exit status and what was printed."""
    printed = io.StringIO()
    return soak.main(arguments, Console(file=printed, width=200)), printed.getvalue()


def test_no_program_with_a_fault_breaks_anything_and_threads_tasks_and_memory_are_right(monkeypatch):
    monkeypatch.setattr(soak, "TRACES_OF_A_THREAD", 25)
    monkeypatch.setattr(soak, "WARM_UP", 50)
    status, printed = run("--programs", "60", "--threads", "8", "--tasks", "50", "--traces", "150")
    assert status == 0, printed


def test_a_model_that_is_not_as_before_is_seen(monkeypatch):
    close = Run.close

    def close_and_leave_something(run):
        close(run)
        run.root.left_behind = True

    monkeypatch.setattr(Run, "close", close_and_leave_something)
    status, printed = run("--programs", "2", "--threads", "0", "--tasks", "0", "--traces", "0")
    assert status == 1
    assert "the model or the thread is not as before" in printed


def test_a_value_that_is_wrong_in_a_program_is_seen(monkeypatch):
    monkeypatch.setattr(faults, "changed", lambda value: value * 2)  # and plain hooks do something else
    status, printed = run("--programs", "6", "--seed", "1", "--threads", "0", "--tasks", "0", "--traces", "0")
    assert status == 1
    assert "and with hooks" in printed


def test_a_value_that_is_wrong_on_threads_and_in_tasks_is_seen(monkeypatch):
    computed = soak.computed
    monkeypatch.setattr(soak, "TRACES_OF_A_THREAD", 1)
    monkeypatch.setattr(soak, "computed", lambda module, x, factor: computed(module, x, factor + 1))
    status, printed = run("--programs", "0", "--threads", "2", "--tasks", "3", "--traces", "0")
    assert status == 1
    assert "2 wrong on threads" in printed
    assert "3 wrong in tasks" in printed
