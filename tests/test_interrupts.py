"""Ctrl-C leaves nothing behind, whichever line it meets."""

import contextlib
import linecache
import signal
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from left_behind import Block, as_before, everything

import nnsight_eager
from nnsight_eager import NNsight

pytestmark = pytest.mark.usefixtures("one_torch_thread")
OUR_FOLDER = str(Path(nnsight_eager.__file__).parent)


@pytest.fixture
def model():
    return NNsight(torch.nn.Sequential(Block(), Block()))


@pytest.fixture
def x():
    return torch.randn(2, 3)


@pytest.fixture(autouse=True)
def _python_hears_ctrl_c():
    """A process started in the background ignores the signal, and Python then leaves it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt():
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_in_the_forward(model, x):
    def body():
        with model.trace(x):
            _ = model[0].second.output

    with as_before(model):
        model._module[0].between = interrupt
        with pytest.raises(KeyboardInterrupt):
            body()
        model._module[0].between = None


def test_ctrl_c_in_the_body(model, x):
    def body():
        with model.trace(x):
            _ = model[0].second.output
            interrupt()

    with as_before(model), pytest.raises(KeyboardInterrupt):
        body()


@contextlib.contextmanager
def interrupted_at(line):
    """Raise `KeyboardInterrupt` at that many lines of ours from here; gives a list that holds the line once it has."""

    def count(frame, event, argument):
        nonlocal line
        if not frame.f_code.co_filename.startswith(OUR_FOLDER):
            return None
        if event == "line":
            line -= 1
            # On leaving a `with` its line comes once more, before `__exit__`: a real Ctrl-C is never raised there.
            if line == 0 and linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip().startswith("with "):
                line = 1
            if line == 0 and is_called_by_a_finalizer(frame):
                line = 1
            if line == 0:
                interrupted.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
                raise KeyboardInterrupt
        return count

    interrupted, before = [], sys.gettrace()
    sys.settrace(count)
    try:
        yield interrupted
    finally:
        sys.settrace(before)


def is_called_by_a_finalizer(frame):
    """Whether what is raised in this frame goes nowhere."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


@contextlib.contextmanager
def at_most(seconds):
    """A hang becomes an error, in a `__del__` as well."""

    def on_alarm(*_):
        alarms.append("hung")
        raise TimeoutError

    alarms, before = [], signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not alarms


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this platform has no timers")
@pytest.mark.parametrize("ending", ["finished", "stopped", "failed"])
def test_ctrl_c_at_any_line_of_ours(x, ending):
    def one_trace():
        with model.trace(x) as tracer:
            model[0].first.output = model[0].first.output * 1
            _ = model[0].output
            if ending == "stopped":
                tracer.stop()
            if ending == "failed":
                raise ZeroDivisionError

    model = NNsight(torch.nn.Sequential(Block()))
    interrupt_everywhere(model, x, one_trace)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this platform has no timers")
@pytest.mark.parametrize("which", ["a first trace", "a model without gradients", "a stored edit"])
def test_ctrl_c_at_any_line_of_ours_in(x, which):
    def without_gradients(x):
        with torch.no_grad():
            return model._module(x)

    def one_trace():
        traced = NNsight(model._module) if which == "a first trace" else model
        with traced.trace(x, fn=without_gradients if which == "a model without gradients" else None):
            _ = traced[0].first.input
            _ = traced[1].output

    model = NNsight(torch.nn.Sequential(torch.nn.Sequential(OrderedDict(first=torch.nn.Linear(3, 3))), torch.nn.Tanh()))
    if which == "a stored edit":
        model.edit(lambda: model[0].first.output, inplace=True)
    interrupt_everywhere(model, x, one_trace)


def interrupt_everywhere(model, x, one_trace):
    """At each line of ours that `one_trace` runs, one after another."""
    with model.trace(x):
        pass
    before = everything(model)
    for line in range(1, 10_000):
        with at_most(5), interrupted_at(line) as interrupted, contextlib.suppress(KeyboardInterrupt, ZeroDivisionError):
            one_trace()
        if not interrupted:
            break
        assert everything(model) == before, interrupted
    assert line > 200
    with as_before(model) if isinstance(model._module[0], Block) else contextlib.nullcontext():
        pass


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this platform has no timers")
def test_ctrl_c_at_any_line_while_a_forward_runs_rewritten(x):
    def one_trace():
        with model.trace(x):
            _ = model[0].source.self_first_0.output
            model[0].source.hidden_0.output *= 2

    model = NNsight(torch.nn.Sequential(Block()))
    one_trace()
    interrupt_everywhere(model, x, one_trace)


@pytest.mark.parametrize("made_by", ["edit", "steer", "ablate"])
def test_ctrl_c_leaves_no_edit_that_nobody_can_take_away(model, made_by):
    def make():
        if made_by == "edit":
            return model.edit(lambda: model[0].output, inplace=True)
        return model.steer(block, torch.ones(3)) if made_by == "steer" else model.ablate(block)

    block = model[0]
    make().remove()
    for line in range(1, 1000):
        with interrupted_at(line) as interrupted, contextlib.suppress(KeyboardInterrupt):
            made = make()
        if not interrupted:
            break
        assert not model._tree.edits, interrupted
    assert line > 5
    made.remove()
    assert not model._tree.edits


@pytest.mark.filterwarnings("ignore:.*is compiled:UserWarning")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this platform has no timers")
def test_ctrl_c_at_any_line_leaves_a_compiled_module_compiled(x):
    def one_trace():
        with model.trace(x):
            _ = model[0].first.output

    model = NNsight(torch.nn.Sequential(Block()))
    model._module[0].compile(backend="eager")
    interrupt_everywhere(model, x, one_trace)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this platform has no timers")
def test_ctrl_c_at_any_line_where_a_fused_layer_calls_its_children(x):
    def one_trace():
        with torch.no_grad(), model.trace(x):
            _ = model[0].linear1.output

    model = NNsight(torch.nn.Sequential(torch.nn.TransformerEncoderLayer(3, 1, 4, batch_first=True).eval()))
    interrupt_everywhere(model, x, one_trace)
