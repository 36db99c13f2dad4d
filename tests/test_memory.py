"""Nothing is kept: not by many traces, not until the collector runs, not by a run that is left behind."""

import contextlib
import gc
import weakref

import pytest
import torch
from left_behind import Block

from nnsight_eager import NNsight


@pytest.fixture
def model():
    return NNsight(torch.nn.Sequential(Block(), Block()))


@pytest.fixture
def x():
    return torch.randn(2, 3)


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
