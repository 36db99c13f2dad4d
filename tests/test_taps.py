"""Taps: what stands in a module's `forward` while somebody listens, and what is there afterwards."""

import contextlib
import copy
import functools
import inspect
import io
import pickle
import threading

import pytest
import torch
from tapped import Scaled, entries

from nnsight_eager import NNsight
from nnsight_eager.coroutine import current_stack
from nnsight_eager.taps import Tap, put_up, take_down, tap_at


class Doubled(Tap):
    """Hears its module's calls and doubles what they give."""

    def __call__(self, /, *args, **kwargs):
        if current_stack() is not self.stack:
            return self.pass_through(args, kwargs)
        return 2 * self.__wrapped__(*args, **kwargs)


def doubled(module):
    tap = tap_at(Doubled(), module)
    put_up(tap, current_stack())
    return tap


@pytest.fixture
def module():
    return Scaled()


@pytest.fixture
def x():
    return torch.randn(2, 3)


def give_a_forward_of_its_own(module):
    """As accelerate's `add_hook_to_module` does."""
    module._old_forward = module.forward

    @functools.wraps(module._old_forward)
    def forward(*args, **kwargs):
        return module._old_forward(*args, **kwargs) + 1

    module.forward = forward
    return forward


# Putting back


def test_the_module_is_exactly_as_before(module, x):
    before, plain = entries(module), module(x)
    tap = doubled(module)
    assert torch.equal(module(x), 2 * plain)
    take_down([tap])
    assert entries(module) == before
    assert torch.equal(module(x), plain)


def test_a_forward_that_the_module_has_of_its_own_is_called_and_put_back_in_its_place(module, x):
    own = give_a_forward_of_its_own(module)
    module.later = "an attribute behind it"
    before, plain = entries(module), module(x)
    tap = doubled(module)
    assert torch.equal(module(x), 2 * plain)
    take_down([tap])
    assert entries(module) == before
    assert module.__dict__["forward"] is own


def test_a_wrapper_that_somebody_puts_on_top_stays_and_ours_is_not_heard_any_more(module, x):
    plain = module(x)
    tap = doubled(module)
    ours = module.forward

    def theirs(*args, **kwargs):
        return ours(*args, **kwargs) + 1

    module.forward = theirs
    assert torch.equal(module(x), 2 * plain + 1)
    take_down([tap])
    assert module.__dict__["forward"] is theirs
    assert torch.equal(module(x), plain + 1)


def test_a_tap_that_somebody_saved_and_puts_back_later_removes_itself(module, x):
    """As transformers 4.57 does around a call."""
    before, plain = entries(module), module(x)
    tap = doubled(module)
    saved = module.forward
    module.forward = lambda *args, **kwargs: saved(*args, **kwargs)
    take_down([tap])
    module.forward = saved
    assert torch.equal(module(x), plain)
    assert entries(module) == before


def test_a_tap_that_somebody_puts_back_below_a_living_one_goes_with_it(module):
    before = entries(module)
    old = doubled(module)
    saved = module.forward
    module.forward = lambda *args, **kwargs: saved(*args, **kwargs)
    take_down([old])
    module.forward = saved
    take_down([doubled(module)])
    assert entries(module) == before


@pytest.mark.parametrize("runs", [1, 2])
def test_a_tap_that_somebody_puts_back_when_its_run_has_ended_is_gone_with_the_next_one(module, x, runs):
    own, plain = give_a_forward_of_its_own(module.child), module(x)
    before, model = entries(module), NNsight(module)
    with contextlib.ExitStack() as opened:
        for _ in range(runs):
            opened.enter_context(model.trace(x)).model.child.input
        saved = module.child.forward
    module.child.forward = saved
    with model.trace(x) as tracer:
        model.child.output
    assert torch.equal(tracer.result, plain)
    assert entries(module) == before
    assert module.child.__dict__["forward"] is own


def test_runs_that_overlap_for_ever_do_not_pile_up(module, x):
    """Each begins before the last one ends, so the module is never without a tap."""

    def how_many():
        forward, count = module.forward, 0
        while isinstance(forward, Tap):
            forward, count = forward.__wrapped__, count + 1
        return count

    before, plain, living = entries(module), module(x), doubled(module)
    for _ in range(20):
        following = doubled(module)
        take_down([living])
        living = following
        assert how_many() == 1
    assert torch.equal(module(x), 2 * plain)
    take_down([living])
    assert entries(module) == before


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_taps_may_leave_in_either_order(module, x, first_out):
    before, plain = entries(module), module(x)
    taps = [doubled(module), doubled(module)]
    assert torch.equal(module(x), 4 * plain)
    take_down([taps.pop(first_out)])
    assert torch.equal(module(x), 2 * plain)
    take_down(taps)
    assert entries(module) == before


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_runs_may_end_in_either_order(module, x, first_out):
    own, plain = give_a_forward_of_its_own(module.child), module(x)
    before, model = entries(module), NNsight(module)
    runs = [model.trace(x).__enter__(), model.trace(2 * x).__enter__()]
    for run in runs:
        run.model.child.output = run.model.child.output * 0
    ended = runs.pop(first_out)
    ended.__exit__(None, None, None)
    assert not ended.result.any()
    assert torch.equal(module(x), plain)
    runs[0].__exit__(None, None, None)
    assert not runs[0].result.any()
    assert entries(module) == before
    assert module.child.__dict__["forward"] is own


# Who is heard


def test_a_call_on_another_thread_passes_through(module, x):
    plain, results = module(x), []
    tap = doubled(module)
    thread = threading.Thread(target=lambda: results.append(module(x)))
    thread.start()
    thread.join()
    take_down([tap])
    assert torch.equal(results[0], plain)


def test_a_plain_call_in_the_body_passes_through(module, x):
    plain, model = module(x), NNsight(module)
    with model.trace(x) as tracer:
        assert torch.equal(module(x), plain)  # not counted as a visit either: the child can still be asked for
        assert torch.equal(model.child.input, x)
        assert torch.equal(module(x), plain)
        model.child.output = model.child.output * 0
        assert torch.equal(module(x), plain)
        assert torch.equal(model.child(x), module.child(x))
    assert not tracer.result.any()


def test_a_direct_call_of_forward_is_heard(x):
    class Direct(Scaled):
        def forward(self, x):
            return self.child.forward(x)

    module = Direct()
    module.child.register_forward_hook(lambda *_: pytest.fail("a direct call runs no hooks"))
    before, model = entries(module), NNsight(module)
    with model.trace(x) as tracer:
        assert torch.equal(model.child.input, x)
        model.child.output = model.child.output * 0
    assert not tracer.result.any()
    assert entries(module) == before


# Copies and looks


@pytest.mark.parametrize("own_forward", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_a_tapped_module_runs_its_own_weights_and_is_clean(module, x, how, own_forward):
    if own_forward:
        module.child.forward = functools.partial(torch.nn.Linear.forward, module.child)
    before, plain = entries(module), module(x)
    taps = [doubled(each) for each in module.modules()]
    if how == "deepcopy":
        copied = copy.deepcopy(module)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    with torch.no_grad():
        copied.child.weight.zero_(), copied.child.bias.fill_(7), copied.scale.fill_(3)
    assert torch.equal(copied(x), torch.full((2, 3), 21.0))
    take_down(taps)
    assert torch.equal(copied(x), torch.full((2, 3), 21.0))
    assert torch.equal(module(x), plain)
    assert entries(module) == before
    assert not [each for each in copied.modules() if isinstance(each.__dict__.get("forward"), Tap)]


def test_a_shallow_copy_of_a_tapped_module_runs_its_own_weights(module, x):
    before, plain = entries(module), module(x)
    tap = doubled(module)
    copied = copy.copy(module)
    copied._parameters = {"scale": torch.nn.Parameter(torch.tensor(3.0))}
    take_down([tap])
    assert torch.allclose(copied(x), 3 * plain)
    assert torch.equal(module(x), plain)
    assert entries(module) == before


def test_the_signature_is_the_forwards_own(module, x):
    signature = inspect.signature(module.forward)
    tap = doubled(module)
    assert inspect.signature(module.forward) == signature
    assert module.forward.__name__ == "forward"
    assert module.forward.__self__ is module
    assert module.forward.__func__ is Scaled.forward
    take_down([tap])
