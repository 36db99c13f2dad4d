"""After a trace the model, the thread and its stacks are as they were, however the trace ended."""

import contextlib
import gc
import signal
import sys
import weakref

import pytest
import torch
from greenlet import greenlet
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from nnsight_eager import NNsight
from nnsight_eager.errors import RunEndedError


class Block(torch.nn.Module):
    """A residual block that runs, between its two layers, what it is told to."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.first.register_forward_hook(lambda *_: None)
        self.between = None

    def forward(self, x):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            hidden = self.first(x)
            if self.between is not None:
                self.between()
            return x + self.second(hidden)


@pytest.fixture
def model():
    return NNsight(torch.nn.Sequential(Block(), Block()))


@pytest.fixture
def x():
    return torch.randn(2, 3)


def everything(model):
    """What a trace could leave behind on the modules, on the thread, and in torch."""
    modules = [
        (
            name,
            [*each.__dict__],
            each.__dict__.get("forward"),
            [[*value] for key, value in each.__dict__.items() if "_hooks" in key],
        )
        for name, each in model._module.named_modules()
    ]
    thread = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        _get_current_function_mode_stack(),
        _get_current_dispatch_mode_stack(),
        sys.gettrace(),
    )
    of_torch = [list(value) for name, value in vars(torch_module).items() if name.startswith("_global_") and "hooks" in name]
    return modules, thread, of_torch


def frames_on_other_stacks():
    """The name of every function that some greenlet is paused in."""
    names = []
    for each in gc.get_objects():
        if issubclass(type(each), greenlet):
            frame = each.gr_frame
            while frame is not None:
                names.append(frame.f_code.co_qualname)
                frame = frame.f_back
    return names


@contextlib.contextmanager
def as_before(model):
    """The block leaves nothing behind, and the model still works."""
    before = everything(model)
    yield
    assert everything(model) == before
    assert not [name for name in frames_on_other_stacks() if "forward" in name or "Module" in name]
    with model.trace(torch.ones(1, 3)) as tracer:
        hidden = model[0].second.output
    assert hidden.shape == (1, 3)
    assert torch.equal(tracer.result, model._module(torch.ones(1, 3)))
    assert everything(model) == before


# However it ends


def test_a_block_that_reads_everything(model, x):
    with as_before(model), model.trace(x):
        _ = model[0].first.input, model[0].first.output, model[0].output, model[1].second.output, model.output


def test_a_block_that_reads_nothing(model, x):
    with as_before(model), model.trace(x):
        pass


def test_an_exception_in_the_body(model, x):
    error = KeyError("mine")

    def body():
        with model.trace(x):
            _ = model[0].second.output
            raise error

    with as_before(model):
        with pytest.raises(KeyError) as raised:
            body()
        assert raised.value is error


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_in_the_forward(model, x, kind):
    def fail():
        raise kind

    def body():
        with model.trace(x):
            _ = model[1].first.output
            _ = model[1].second.output

    with as_before(model):
        model._module[1].between = fail
        with pytest.raises(kind):
            body()
        model._module[1].between = None


def test_an_exception_in_the_forward_that_the_body_handles(model, x):
    def fail():
        raise ZeroDivisionError

    def body():
        with model.trace(x):
            try:
                _ = model[0].second.output
            except ZeroDivisionError:
                handled.append(True)

    handled = []
    with as_before(model):
        model._module[0].between = fail
        with contextlib.suppress(RunEndedError):  # the forward has no end for the block to wait for
            body()
        assert handled
        model._module[0].between = None


def test_an_edit_that_makes_the_forward_fail_behind_the_block(model, x):
    def body():
        with model.trace(x):
            model[0].output = torch.ones(2, 7)

    with as_before(model), pytest.raises(RuntimeError):
        body()


def test_a_stop(model, x):
    reached = []
    with as_before(model):
        with model.trace(x) as tracer:
            _ = model[0].output
            tracer.stop()
            reached.append("behind")
        assert not reached


def test_a_return_out_of_the_block_finishes_the_forward(model, x):
    ran = []

    def body():
        with model.trace(x):
            return model[0].output

    with as_before(model):
        model._module[1].between = lambda: ran.append("the second block")
        assert body().shape == (2, 3)
        assert ran == ["the second block"]
        model._module[1].between = None


@pytest.mark.parametrize("way", ["break", "continue"])
def test_leaving_a_loop_out_of_the_block(model, x, way):
    with as_before(model):
        for _ in range(3):
            with model.trace(x):
                _ = model[0].output
                if way == "break":
                    break
                continue


def test_a_trace_entered_by_hand_and_left_behind(model, x):
    with as_before(model):
        tracer = model.trace(x)
        tracer.__enter__()
        _ = model[1].second.output
        del tracer


def test_a_generator_that_is_dropped_inside_its_trace(model, x):
    def reads():
        with model.trace(x):
            yield model[0].output
            yield model[1].output

    with as_before(model):
        generator = reads()
        next(generator)
        del generator


def test_a_trace_in_a_cycle_that_the_collector_finds(model, x):
    with as_before(model):
        cycle = [model.trace(x)]
        cycle.append(cycle)
        cycle[0].__enter__()
        _ = model[0].first.output
        del cycle
        gc.collect()


def test_finally_blocks_of_the_model_run_in_a_run_that_is_left_behind(x):
    events = []

    class Careful(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.child = torch.nn.Linear(3, 3)

        def forward(self, x):
            try:
                return self.child(x)
            finally:
                events.append("finally")

    model = NNsight(Careful())
    tracer = model.trace(x)
    tracer.__enter__()
    _ = model.child.output
    assert events == []
    del tracer
    assert events == ["finally"]


# Ctrl-C


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


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this platform has no timers")
def test_ctrl_c_at_any_moment(model, x):
    """A timer raises it wherever the trace happens to be: in the body, in the model, in a line of ours."""

    def on_alarm(*_):
        raise KeyboardInterrupt

    def traces():
        while True:
            with model.trace(x):
                for block in model:
                    block.first.output = block.first.output * 1
                    _ = block.output

    old, before = signal.signal(signal.SIGALRM, on_alarm), everything(model)
    try:
        for attempt in range(150):
            signal.setitimer(signal.ITIMER_REAL, 0.002 + attempt % 7 * 1e-4)
            with pytest.raises(KeyboardInterrupt):
                traces()
            gc.collect(0)
            assert everything(model) == before, attempt
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    with as_before(model):
        pass


# Memory


def one_trace(model, x):
    with model.trace(x):
        model[0].first.output = model[0].first.output * 2
        _ = model[1].output


def test_two_thousand_traces_leave_no_objects_behind(model, x):
    for _ in range(20):
        one_trace(model, x)
    gc.collect()
    before = len(gc.get_objects())
    gc.disable()
    try:
        for _ in range(2_000):
            one_trace(model, x)
        assert len(gc.get_objects()) - before < 100
    finally:
        gc.enable()


def test_activations_are_freed_by_reference_count(model, x):
    gc.disable()
    try:
        with model.trace(x):
            hidden = model[0].output
            alive = weakref.ref(hidden)
            del hidden
            _ = model[1].output
            assert alive() is not None  # the residual stream: the model still holds it
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("ending", ["finished", "stopped", "failed", "left behind"])
def test_the_model_is_freed_by_reference_count(x, ending):
    model = NNsight(torch.nn.Sequential(Block(), Block()))
    alive = weakref.ref(model._module)
    gc.disable()
    try:
        if ending == "left behind":
            model.trace(x).__enter__()
        elif ending == "failed":
            with contextlib.suppress(RuntimeError), model.trace(torch.ones(2, 7)):
                _ = model[0].output
        else:
            with model.trace(x) as tracer:
                _ = model[0].first.output
                if ending == "stopped":
                    tracer.stop()
            del tracer
        del model
        assert alive() is None
    finally:
        gc.enable()
