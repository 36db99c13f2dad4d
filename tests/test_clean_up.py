"""After a trace the model, the thread and its stacks are as they were, however the trace ended."""

import contextlib
import gc

import pytest
import torch
from left_behind import Block, as_before

from nnsight_eager import NNsight
from nnsight_eager.errors import RunEndedError


@pytest.fixture
def model():
    return NNsight(torch.nn.Sequential(Block(), Block()))


@pytest.fixture
def x():
    return torch.randn(2, 3)


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


def test_a_trace_that_is_left_behind_while_a_stored_edit_waits_in_it(model, x):
    events = []

    def edit():
        try:
            _ = model[1].second.output
        finally:
            events.append("finally")

    with as_before(model), model.edit(edit, inplace=True):
        tracer = model.trace(x)
        tracer.__enter__()
        _ = model[0].output
        assert events == []
        del tracer
        assert events == ["finally"]


def test_what_was_waited_for_where_the_forward_failed_is_not_waited_for_by_the_next_run(model, x):
    def fail():
        raise ZeroDivisionError

    with as_before(model):
        model._module[0].between = fail
        with pytest.raises(ZeroDivisionError), model.trace() as tracer:
            tracer.invoke(x, lambda: model[0].first.output)
            tracer.invoke(x, lambda: model[1].first.output)
        model._module[0].between = None
        with model.trace(x):
            last = model[1].second.output
        assert last.shape == (2, 3)


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
