# ruff: noqa: C416 -- a loop over the steps, and an error that leaves the trace, are what is tested
"""Loops over steps: each ask is of the current step, and a loop ends when generation ends."""

import sys

import pytest
import torch
from small_models import X4, Stack, hooked

from nnsight_eager import NNsight
from nnsight_eager.errors import NotReachedError, StepError
from nnsight_eager.steps import chosen as steps_of

BEHIND_THE_END = "`tracer.iter[...]` was given {}; how many steps there will be is not known, so none counts from the end."


@pytest.fixture(params=["first trace", "later trace"])
def model(request):
    model = NNsight(Stack())
    if request.param == "later trace":
        _ = model.trace(X4, fn=model._module.generate).result
    return model


def generate(model, steps=3):
    return model.trace(X4, steps, fn=model._module.generate)


def each_step(model, name, steps=3):
    [seen] = hooked(model._module, lambda: model._module.generate(X4, steps), name)
    return seen


def same(read, seen):
    return len(read) == len(seen) and all(map(torch.equal, read, seen))


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        (slice(None), [0, 1, 2, 3, 4]),
        (slice(2, None), [2, 3, 4]),
        (slice(1, 3), [1, 2]),
        (slice(0, 5, 2), [0, 2, 4]),
        (slice(1, None, 3), [1, 4]),
        (slice(2, 2), []),
        (slice(0, 50, 2), [0, 2, 4]),
        ([0, 3], [0, 3]),
        ((1, 99), [1]),
        ([], []),
        (range(1, 4), [1, 2, 3]),
        (3, [3]),
        (0, [0]),
    ],
    ids=repr,
)
def test_a_loop_visits_the_chosen_steps_that_there_are(model, selection, chosen):
    seen = each_step(model, "h.1", 5)
    steps, read, after = [], [], False
    with generate(model, 5) as tracer:
        for step in tracer.iter[selection]:
            steps.append(step)
            read.append(model.h[1].output)
        after = True
    assert steps == chosen
    assert same(read, [seen[step] for step in chosen])
    assert after
    assert torch.equal(tracer.result, model._module.generate(X4, 5))


def test_all_is_every_step(model):
    with generate(model) as tracer:
        read = [model.head.output for _ in tracer.all()]
    assert same(read, each_step(model, "head"))
    with generate(model) as tracer:
        assert list(tracer.iter) == [0, 1, 2]


def test_code_after_the_loop_runs_when_generation_stops_early(model):
    with generate(model, 2) as tracer:
        steps = list(tracer.iter[:100])
        result = tracer.result
    assert steps == [0, 1]
    assert torch.equal(result, model._module.generate(X4, 2))


@pytest.mark.parametrize("break_at", [0, 1, 2])
def test_a_loop_can_be_broken_out_of_and_the_step_goes_on(model, break_at):
    seen = each_step(model, "head")
    with generate(model) as tracer:
        for step in tracer.iter[:]:
            if step == break_at:
                break
        head = model.head.output
    assert torch.equal(head, seen[break_at])
    assert torch.equal(tracer.result, model._module.generate(X4))


def test_one_loop_goes_on_where_another_was_left(model):
    with generate(model, 5) as tracer:
        first = [step for step in tracer.iter[:2]]
        rest = [step for step in tracer.iter[2:]]
    assert first == [0, 1]
    assert rest == [2, 3, 4]


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        (-1, BEHIND_THE_END.format(-1)),
        (slice(None, -1), BEHIND_THE_END.format(-1)),
        (slice(-2, None), BEHIND_THE_END.format(-2)),
        ([0, -3], BEHIND_THE_END.format(-3)),
        ("1", "`tracer.iter[...]` takes whole numbers, slices and lists of them, not `'1'`."),
        (True, "`tracer.iter[...]` takes whole numbers, slices and lists of them, not `True`."),
        (1.0, "`tracer.iter[...]` takes whole numbers, slices and lists of them, not `1.0`."),
        (slice(0, 2.5), "`tracer.iter[...]` takes whole numbers, slices and lists of them, not `2.5`."),
        ([None], "`tracer.iter[...]` takes whole numbers, slices and lists of them, not `None`."),
        (slice(0, 4, 0), "`tracer.iter[...]` cannot go on by 0 steps."),
        ([2, 1], "`tracer.iter[[2, 1]]` does not name its steps in order, and a model runs them in order, once each."),
        ([1, 1], "`tracer.iter[[1, 1]]` does not name its steps in order, and a model runs them in order, once each."),
    ],
    ids=repr,
)  # fmt: skip
def test_what_selects_no_steps_is_refused_with_a_sentence(model, selection, said):
    with generate(model) as tracer, pytest.raises(StepError) as caught:
        _ = tracer.iter[selection]
    assert str(caught.value).splitlines()[0] == said
    assert len(str(caught.value).splitlines()) == 2


def test_a_stride_backwards_is_refused_with_a_sentence(model):
    with generate(model) as tracer, pytest.raises(StepError):
        _ = tracer.iter[5:0:-1]


def test_a_tensor_or_numpy_integer_is_a_whole_number(model):
    with generate(model) as tracer:
        assert list(tracer.iter[torch.tensor(1) : torch.tensor(3)]) == [1, 2]


def test_a_step_that_has_ended_is_refused(model):
    with pytest.raises(StepError) as caught, generate(model) as tracer:
        for _ in tracer.iter[2]:
            pass
        for _ in tracer.iter[1]:
            pass
    assert str(caught.value) == ("Step 1 has already ended: the run is in step 2.\nWrite `tracer.iter[2:]` to go on from here.")


# Within a step


def test_edits_in_each_step_are_what_plain_hooks_do(model):
    with generate(model) as tracer:
        for step in tracer.iter[:]:
            model.h[1].output = model.h[1].output * (step + 1)
    steps = iter(range(3))
    handle = model._module.h[1].register_forward_hook(lambda m, a, out: out * (next(steps) + 1))
    expected = model._module.generate(X4)
    handle.remove()
    assert torch.equal(tracer.result, expected)


def test_without_a_loop_asks_are_of_the_first_step(model):
    with generate(model) as tracer:
        first = model.h[0].output
        head = model.head.output
        whole = model.output
    assert torch.equal(first, model.h[0](X4))
    assert torch.equal(head, model(X4))
    assert torch.equal(whole, head)
    assert torch.equal(tracer.result, model._module.generate(X4))


def test_reading_in_order_in_each_step_works_from_any_module(model):
    firsts, heads = hooked(model._module, lambda: model._module.generate(X4), "h.0", "head")
    with generate(model) as tracer:
        read = [(model.h[0].output, model.head.output) for _ in tracer.iter[:]]
    assert same([a for a, _ in read], firsts)
    assert same([b for _, b in read], heads)


def test_tracer_next_goes_to_the_next_step(model):
    seen = each_step(model, "h.2")
    with generate(model) as tracer:
        read = [model.h[2].output]
        for _ in range(2):
            tracer.next()
            read.append(model.h[2].output)
    assert same(read, seen)


def test_envoy_next_goes_to_the_next_step_of_a_module_that_runs_once(model):
    with generate(model):
        read = [model.h[2].output, model.h[2].next().output, model.h[2].next().output]
    assert same(read, each_step(model, "h.2"))


def test_both_nexts_together_mean_the_same_one_step(model):
    with generate(model) as tracer:
        one = model.h[-1].output
        tracer.next()
        two = model.h[-1].next().output
        tracer.next()
        three = model.h[-1].next().output
    assert same([one, two, three], each_step(model, "h.2"))


def test_the_answer_of_next_stays_with_its_visit(model):
    seen = each_step(model, "h.0")
    with generate(model) as tracer:
        _ = model.h[0].output
        again = model.h[0].next()
        second = again.output
        again.output = torch.zeros(1, 4)
    assert torch.equal(second, seen[1])
    with torch.no_grad():
        zeroed = model.head(model.h[2](model.h[1](torch.zeros(1, 4))))
    assert torch.equal(tracer.result, model(zeroed))


def test_beyond_the_last_step_nothing_is_reached(model):
    with generate(model) as tracer:
        for _ in range(3):
            tracer.next()
        with pytest.raises(NotReachedError):
            _ = model.head.output
        after = True
    assert after


def test_what_runs_before_the_first_forward_belongs_to_step_zero():
    """As an encoder does, which runs once, before the decoder's steps."""
    model = NNsight(Stack())
    encoder = model._module.unused

    def encode_and_generate(x):
        return model._module.generate(encoder(x))

    for _ in range(2):
        with model.trace(X4, fn=encode_and_generate) as tracer:
            read = []
            encoded = model.unused.output
            for _ in tracer.iter[:]:
                read.append(model.h[0].output)
        assert torch.equal(encoded, encoder(X4))
        assert len(read) == 3
        assert torch.equal(read[0], model.h[0](encoded))


def test_a_call_that_never_runs_the_root_is_one_step(model):
    def blocks_only(x):
        return model._module.h[1](model._module.h[0](x))

    with model.trace(X4, fn=blocks_only) as tracer:
        steps = []
        for step in tracer.iter[:]:
            steps.append(step)
            hidden = model.h[0].output
    assert steps == [0]
    assert torch.equal(hidden, model.h[0](X4))
    assert torch.equal(tracer.result, blocks_only(X4))


@pytest.mark.parametrize("selection", [7, slice(3, None), slice(50, 60), [4, 6]], ids=str)
def test_a_loop_warns_at_its_line_where_no_step_that_it_asks_for_comes(model, selection):
    ran = []
    with pytest.warns(UserWarning, match="never came") as told, generate(model) as tracer:
        line = sys._getframe().f_lineno + 1
        for step in tracer.iter[selection]:
            ran += [step]
        ran += ["behind the loop"]
    assert ran == ["behind the loop"]
    first = selection.start if isinstance(selection, slice) else next(iter(steps_of(selection)))
    (warning,) = told
    assert str(warning.message) == f"Step {first} never came, so this loop did nothing: the run made 3 steps, counted from 0."
    assert (warning.filename, warning.lineno) == (__file__, line)


def test_a_loop_that_ends_after_some_of_its_steps_does_not_warn(model):
    with generate(model) as tracer:
        assert list(tracer.iter[1:9]) == [1, 2]
    with generate(model) as tracer:
        assert list(tracer.iter[2:2]) == []
