"""What has passed is an error, never another value; it is raised at the line that asked."""

import pickle
import traceback

import pytest
import torch
from small_models import X4, Stack, hooked

from nnsight_eager import NNsight
from nnsight_eager.errors import InsideForwardError, NotReachedError, OutOfOrderError, OutsideTraceError, RunEndedError


@pytest.fixture(params=["first trace", "later trace"])
def model(request):
    """A wrapped model in its first trace, when its order is being learned, and in a later one, when it is known."""
    model = NNsight(Stack())
    if request.param == "later trace":
        for _ in range(2):
            _ = model.trace(X4).result
            _ = model.trace(X4, fn=model._module.generate).result
    return model


class Twice(torch.nn.Module):
    """Uses one block three times, under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = torch.nn.Linear(4, 4)
        self.alias = self.shared
        self.other = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.alias(self.other(self.shared(self.shared(x))))

    def generate(self, x):
        for _ in range(3):
            x = self(x)
        return x


@pytest.fixture(params=["first trace", "later trace"])
def twice(request):
    model = NNsight(Twice())
    if request.param == "later trace":
        _ = model.trace(X4).result
    return model


def is_as_before(model):
    return all("forward" not in m.__dict__ and not m._forward_hooks for m in model._module.modules())


def line_of(error):
    """The source line of this file that raised."""
    return [each.line for each in traceback.extract_tb(error.__traceback__) if each.filename == __file__][-1]


# Passed


def test_reading_backwards_names_both_points_at_the_line_that_asked(model):
    with pytest.raises(OutOfOrderError) as caught, model.trace(X4):
        _ = model.h[2].output
        _ = model.h[0].output
        raise AssertionError("not reached")
    error = caught.value
    assert str(error) == (
        "`model.h[0].output` has already run in this step (step 0); the model was paused at `model.h[2].output`.\n"
        "Read `model.h[0].output` above the line that reads `model.h[2].output`; "
        "for a later visit of it write `model.h[0].next().output`."
    )
    assert (error.asked, error.paused_at, error.step) == ("model.h[0].output", "model.h[2].output", 0)
    assert line_of(error) == "_ = model.h[0].output"
    assert is_as_before(model)


def test_a_module_that_does_not_run_is_told_apart_from_one_that_has_passed(model):
    with pytest.raises(NotReachedError) as caught, model.trace(X4):
        _ = model.h[2].output
        _ = model.unused.output
    error = caught.value
    assert str(error).splitlines()[0].startswith("`model.unused.output` did not run: ")
    assert (error.asked, error.paused_at, error.step) == ("model.unused.output", "model.h[2].output", 0)
    assert line_of(error) == "_ = model.unused.output"
    assert is_as_before(model)


@pytest.mark.parametrize("kind", [OutOfOrderError, NotReachedError])
def test_the_errors_pickle_with_their_facts(model, kind):
    with pytest.raises(kind) as caught, model.trace(X4):
        _ = model.h[1].output
        _ = (model.h[0] if kind is OutOfOrderError else model.unused).output
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is kind
    assert str(copy) == str(caught.value)
    assert vars(copy) == vars(caught.value)


def test_the_input_of_what_has_run_is_passed_as_well(model):
    with pytest.raises(OutOfOrderError) as caught, model.trace(X4):
        _ = model.h[1].lin.output
        _ = model.h[1].input
    assert caught.value.asked == "model.h[1].input"
    assert caught.value.paused_at == "model.h[1].lin.output"


def test_the_output_around_a_module_comes_after_it(model):
    with model.trace(X4) as tracer:
        inner = model.h[1].lin.output
        outer = model.h[1].output
        whole = model.output
    [[inner_seen], [outer_seen]] = hooked(model._module, lambda: model(X4), "h.1.lin", "h.1")
    assert torch.equal(inner, inner_seen)
    assert torch.equal(outer, outer_seen)
    assert whole is tracer.result


def test_an_error_caught_in_the_body_does_not_go_back(model):
    with model.trace(X4) as tracer:
        _ = model.h[2].output
        with pytest.raises(OutOfOrderError):
            _ = model.h[0].output
        with pytest.raises(OutOfOrderError):
            _ = model.h[1].output
        result = tracer.result
    assert torch.equal(result, model(X4))


def test_after_the_result_every_point_has_passed(model):
    with pytest.raises(OutOfOrderError) as caught, model.trace(X4) as tracer:
        _ = tracer.result
        _ = model.h[0].output
    assert caught.value.step == 0
    with pytest.raises(NotReachedError), model.trace(X4) as tracer:
        _ = tracer.result
        _ = model.unused.output


def test_an_edit_of_what_has_passed_is_refused(model):
    with pytest.raises(OutOfOrderError) as caught, model.trace(X4):
        _ = model.h[1].output
        model.h[0].output = torch.zeros(1, 4)
    assert line_of(caught.value) == "model.h[0].output = torch.zeros(1, 4)"


# Asks belong to the step they are made in


def test_an_ask_is_never_served_by_the_next_step(model):
    generate = model._module.generate
    with pytest.raises(OutOfOrderError) as caught, model.trace(X4, fn=generate):
        _ = model.h[2].output
        _ = model.h[0].output
    assert caught.value.step == 0
    with pytest.raises(NotReachedError) as caught, model.trace(X4, fn=generate):
        _ = model.unused.output
    assert caught.value.step == 0


def test_a_missed_ask_stops_before_the_next_step_begins(model):
    events = []
    handles = [
        model._module.register_forward_pre_hook(lambda *a: events.append("step")),
        model._module.head.register_forward_hook(lambda *a: events.append("head")),
    ]
    with model.trace(X4, fn=model._module.generate) as tracer:
        _ = model.h[2].output
        with pytest.raises(OutOfOrderError):
            _ = model.h[0].output
        assert events in (["step"], ["step", "head"])
        tracer.next()
        second = model.h[0].output
        assert events == ["step", "head", "step"]
    for handle in handles:
        handle.remove()
    assert torch.equal(second, model.h[0](model(X4)))


# One module, several visits


def test_plain_asking_gives_the_first_visit_and_next_the_further_ones(twice):
    [seen] = hooked(twice._module, lambda: twice(X4), "shared")
    with twice.trace(X4):
        first = twice.shared.output
        second = twice.shared.next().output
        third = twice.alias.next().output
    assert all(map(torch.equal, (first, second, third), seen))


def test_a_first_visit_is_passed_once_the_run_has_moved_on(twice):
    with pytest.raises(OutOfOrderError) as caught, twice.trace(X4):
        _ = twice.other.output
        _ = twice.shared.output
    assert caught.value.paused_at == "model.other.output"
    with pytest.raises(OutOfOrderError), twice.trace(X4):
        _ = twice.other.output
        _ = twice.alias.output


def test_next_edits_that_visit_alone(twice):
    shared, other = twice._module.shared, twice._module.other
    with twice.trace(X4) as tracer:
        _ = twice.shared.output
        twice.shared.next().output = torch.zeros(1, 4)
    assert torch.equal(tracer.result, shared(other(torch.zeros(1, 4))))


def test_next_goes_on_into_the_next_step(twice):
    seen, _ = hooked(twice._module, lambda: twice._module.generate(X4), "shared", "other")
    with twice.trace(X4, fn="generate"):
        read = [twice.shared.output, *(twice.shared.next().output for _ in range(8))]
        with pytest.raises(NotReachedError):
            _ = twice.shared.next().output
    assert len(seen) == 9
    assert all(map(torch.equal, read, seen))


# Where no run is open


def test_a_point_outside_every_trace_is_refused(model):
    with pytest.raises(OutsideTraceError) as caught:
        _ = model.h[0].output
    assert str(caught.value) == (
        "`model.h[0].output` was asked for where no trace of this model is open.\n"
        "Read it inside `with model.trace(...):`, where a value stays an ordinary variable afterwards, or hold a run open: "
        "`run = model.trace(...).start()`."
    )
    with model.trace(X4):
        pass
    with pytest.raises(OutsideTraceError):
        model.h[0].output = torch.zeros(1, 4)


def test_a_trace_of_another_model_does_not_answer(model):
    with NNsight(Stack()).trace(X4), pytest.raises(OutsideTraceError):
        _ = model.h[0].output


def test_the_bound_tree_of_a_run_that_has_ended_says_so(model):
    with model.trace(X4) as tracer:
        pass
    with pytest.raises((RunEndedError, OutOfOrderError)):
        _ = tracer.model.h[0].output


def test_a_point_asked_for_by_the_forward_itself_is_refused(model):
    handle = model._module.h[1].register_forward_hook(lambda *a: model.h[0].output)
    with pytest.raises(InsideForwardError) as caught, model.trace(X4):
        _ = model.head.output
    handle.remove()
    assert str(caught.value).startswith("A point was asked for by code that the model's own forward pass called")
    assert is_as_before(model)
