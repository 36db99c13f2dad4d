"""Several inputs in one trace: what each body sees, in what order the bodies go on, and how a trace of them ends."""

import contextlib
import gc
import threading
import traceback
import weakref

import pytest
import torch
from left_behind import Block, as_before
from small_models import X4, Stack, hooked

from nnsight_eager import LanguageModel, NNsight
from nnsight_eager.errors import (
    BatchError,
    DeadlockError,
    EditError,
    InputError,
    InvokeError,
    NotReachedError,
    OutOfOrderError,
    OutsideTraceError,
    RowsError,
    RunEndedError,
    RunError,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")

A, B, C = X4, X4 + 1, torch.ones(2, 4)
PROMPTS = ["The Eiffel Tower is in the city of", "Rome", "When Mary and John went to the store"]


@pytest.fixture(params=["first trace", "later trace"])
def model(request):
    model = NNsight(Stack())
    if request.param == "later trace":
        _ = model.trace(X4).result
    return model


def nothing():
    """A body that asks for nothing."""


def close(one, other):
    return one.shape == other.shape and torch.allclose(one, other, atol=1e-5)


def outputs(model, x, *names):
    """What the modules return in a plain call."""
    return [each[0] for each in hooked(model._module, lambda: model._module(x), *names)]


# Three ways to write an invoke


def test_a_block_a_decorated_function_and_a_function_passed_are_one_mechanism(model):
    with model.trace() as tracer:
        with tracer.invoke(A) as block:
            first = model.h[1].output

        @tracer.invoke(B)
        def decorated():
            return model.h[1].output

        passed = tracer.invoke(C, lambda: model.h[1].output)
    for value, x in ((first, A), (decorated.result, B), (passed.result, C)):
        assert close(value, outputs(model, x, "h.1")[0])
    assert repr(block) == "<invoke 1 ([1, 4] float32): has run>"


@pytest.mark.parametrize("batched", [True, False])
def test_names_that_blocks_bind_are_there_behind_the_trace(model, batched):
    with model.trace(batched=batched) as tracer:
        with tracer.invoke(A):
            a = model.h[0].output
            both = "first"
        with tracer.invoke(B):
            b = model.h[0].output + a
            both = both + " and second"
    assert close(b, outputs(model, A, "h.0")[0] + outputs(model, B, "h.0")[0])
    assert both == "first and second"


def test_an_invoke_without_input_sees_the_rows_of_all(model):
    with model.trace() as tracer:
        tracer.invoke(A, nothing)
        every = tracer.invoke(lambda: model.h[2].output)
        tracer.invoke(C, nothing)
        with tracer.invoke():
            block = model.h[2].output
    assert close(every.result, outputs(model, torch.cat((A, C)), "h.2")[0])
    assert every.result is block


def test_a_function_with_rows_none_sees_all_rows_and_has_an_input(model):
    with model.trace() as tracer:
        every = tracer.invoke(A, lambda: model.h[2].output, rows=None)
        own = tracer.invoke(B, lambda: model.h[2].output)
    assert every.result.shape == (2, 4)
    assert torch.equal(own.result, every.result[1:])


def test_a_result_is_there_when_the_trace_has_ended_and_not_before(model):
    with pytest.raises(InvokeError) as caught, model.trace() as tracer:
        invoke = tracer.invoke(A, nothing)
        assert repr(invoke) == "<invoke 1 ([1, 4] float32): runs when the trace ends>"
        assert repr(tracer) == "<forward of Stack: 1 invoke>"
        invoke.result
    assert str(caught.value) == (
        "The function of invoke 1 ([1, 4] float32) has not run to its end.\nRead `.result` when the trace has ended."
    )


def test_the_result_of_a_trace_is_the_whole_batchs_in_every_invoke_and_behind_it(model):
    with model.trace() as tracer:
        one = tracer.invoke(A, lambda: tracer.result)
        two = tracer.invoke(B, lambda: tracer.result)
    assert one.result is two.result is tracer.result
    assert close(tracer.result, model._module(torch.cat((A, B))))


def test_one_by_one_each_invoke_has_a_forward_of_its_own_and_the_trace_their_results(model):
    with model.trace(batched=False) as tracer:
        calls = hooked(model._module, lambda: [tracer.invoke(x, nothing) for x in (A, B, C)], "h.0")
    assert [len(each) for each in calls[0]] == [1, 1, 2]
    assert all(torch.equal(result, model._module(x)) for result, x in zip(tracer.result, (A, B, C), strict=True))


def test_values_go_from_one_prompt_to_another_by_closure(model):
    taken = {}

    def take():
        taken["hidden"] = model.h[1].output

    def put():
        _ = model.h[1].output  # here the invokes above have been
        model.h[1].output = taken["hidden"]

    with model.trace() as tracer:
        tracer.invoke(A, take)
        tracer.invoke(B, put)
    assert close(tracer.result, model._module(torch.cat((A, A))))


# Order


def test_at_one_visit_the_bodies_go_on_in_the_order_written(model):
    events = []

    def body(name):
        def run():
            for layer in (0, 1):
                model.h[layer].input
                events.append(f"{name} at the input of {layer}")
                model.h[layer].output
                events.append(f"{name} at the output of {layer}")

        return run

    with model.trace() as tracer:
        tracer.invoke(A, body("a"))
        tracer.invoke(B, body("b"))
        tracer.invoke(body("all"))
    assert events == [
        f"{name} at the {kind} of {n}" for n in (0, 1) for kind in ("input", "output") for name in ("a", "b", "all")
    ]


def test_a_body_that_sees_all_rows_sees_the_edits_written_above_it_and_not_those_below(model):
    def edit(number):
        def run():
            model.h[0].output = torch.full((1, 4), float(number))

        return run

    with model.trace() as tracer:
        tracer.invoke(A, edit(1))
        before = tracer.invoke(lambda: model.h[0].output.clone())
        tracer.invoke(B, edit(2))
        after = tracer.invoke(lambda: model.h[0].output.clone())
    assert before.result[0].tolist() == [1] * 4
    assert close(before.result[1:], outputs(model, B, "h.0")[0])
    assert after.result.tolist() == [[1] * 4, [2] * 4]


def test_an_edit_of_all_rows_is_what_the_next_body_reads_its_rows_of(model):
    def zero():
        model.h[0].output = torch.zeros(2, 4)

    with model.trace() as tracer:
        tracer.invoke(A, nothing)
        tracer.invoke(zero)
        read = tracer.invoke(B, lambda: model.h[0].output)
    assert read.result.tolist() == [[0] * 4]


def test_a_body_that_asks_for_a_point_that_has_run_is_told_at_its_own_line_and_the_others_go_on(model):
    def late():
        model.h[2].output
        with pytest.raises(OutOfOrderError) as caught:
            model.h[0].output
        return str(caught.value).splitlines()[0]

    with model.trace() as tracer:
        error = tracer.invoke(A, late)
        head = tracer.invoke(B, lambda: model.head.output)
    assert error.result == (
        "`model.h[0].output` has already run in this step (step 0); the model was paused at `model.h[2].output`."
    )
    assert close(head.result, model._module(B))


def test_a_body_that_asks_for_a_module_that_does_not_run_is_told_so_and_the_others_go_on(model):
    def lost():
        with pytest.raises(NotReachedError):
            model.unused.output

    with model.trace() as tracer:
        tracer.invoke(A, lost)
        head = tracer.invoke(B, lambda: model.head.output)
    assert close(head.result, model._module(B))


# Rows: what peers get wrong


class Reshaped(torch.nn.Module):
    """Computes on its rows in other arrangements."""

    def __init__(self):
        super().__init__()
        names = ("nested", "flat", "repeated", "whole", "first", "shared", "one_in_memory", "scalar")
        self.at = torch.nn.ModuleDict({name: torch.nn.Identity() for name in names})

    def forward(self, x):
        flat = self.at["flat"](x.reshape(-1, x.shape[-1]))
        x = self.at["nested"](flat.reshape(x.shape))
        repeated = self.at["repeated"](x.repeat_interleave(5, 0))
        whole = self.at["whole"](torch.arange(7.0))
        shared = self.at["shared"](torch.ones(1, 3))
        same = self.at["one_in_memory"](torch.ones(3).expand(len(x), 3))
        total = self.at["scalar"](x.sum())
        return x * shared.mean() * same.mean(1)[:, None, None] + 0 * (repeated.sum() + whole.sum() + total)


@pytest.fixture
def reshaped():
    return NNsight(Reshaped())


NESTED = [torch.arange(6.0).reshape(1, 3, 2), torch.arange(12.0).reshape(2, 3, 2) + 10]


def in_two(reshaped, function):
    with reshaped.trace() as tracer:
        tracer.invoke(NESTED[0], nothing)
        invoke = tracer.invoke(NESTED[1], function)
    return invoke.result, tracer.result


def test_nested_batch_dimensions_and_flattened_tokens_are_the_invokes_rows(reshaped):
    seen, _ = in_two(reshaped, lambda: (reshaped.at["flat"].output, reshaped.at["nested"].output))
    assert torch.equal(seen[0], NESTED[1].reshape(6, 2))
    assert torch.equal(seen[1], NESTED[1])


def test_an_edit_of_flattened_tokens_changes_the_invokes_rows_and_no_others(reshaped):
    def double():
        reshaped.at["flat"].output *= 2

    _, result = in_two(reshaped, double)
    assert torch.equal(result, torch.cat((NESTED[0], NESTED[1] * 2)))


@pytest.mark.parametrize("name", ["repeated", "whole"])
def test_what_has_no_rows_that_can_be_told_is_refused_and_is_seen_by_who_sees_all(reshaped, name):
    def refused():
        for ask in (lambda: reshaped.at[name].input, lambda: reshaped.at[name].output, lambda: reshaped.at[name].inputs):
            with pytest.raises(RowsError) as caught:
                ask()
        with pytest.raises(EditError):
            reshaped.at[name].output = torch.zeros(2, 3, 2)
        return caught.value.asked

    with reshaped.trace() as tracer:
        tracer.invoke(NESTED[0], nothing)
        own = tracer.invoke(NESTED[1], refused)
        every = tracer.invoke(lambda: reshaped.at[name].output)
    assert own.result == f"model.at.{name}.inputs"
    assert every.result.shape[0] == (15 if name == "repeated" else 7)


@pytest.mark.parametrize("name", ["shared", "scalar"])
def test_what_all_rows_share_is_read_and_neither_replaced_nor_changed_in_place(reshaped, name):
    read, plain = in_two(reshaped, lambda: reshaped.at[name].output.clone())
    assert torch.equal(read, torch.ones(1, 3) if name == "shared" else torch.cat(NESTED).sum())

    def in_place():
        reshaped.at[name].output.add_(1)

    with pytest.raises(EditError) as caught:
        in_two(reshaped, in_place)
    assert str(caught.value).splitlines() == [
        f"`model.at.{name}.output` was changed in place in invoke 2 ([2, 3, 2] float32), and all invokes share it.",
        "Change a copy (`.clone()`), or change it in an invoke that sees all rows: `with tracer.invoke():`.",
    ]

    def replaced():
        with pytest.raises(EditError):
            reshaped.at[name].output = torch.zeros(1, 3)

    assert torch.equal(in_two(reshaped, replaced)[1], plain)


def test_a_shared_value_that_was_changed_in_place_is_refused_before_the_body_goes_on_to_anything(reshaped):
    def changed_and_on():
        reshaped.at["shared"].output.mul_(3)
        reshaped.at["scalar"].output
        raise AssertionError

    with pytest.raises(EditError):
        in_two(reshaped, changed_and_on)


def test_a_shared_value_changed_in_place_later_is_the_bodys_own_copy(reshaped):
    def late():
        shared = reshaped.at["shared"].output
        reshaped.at["one_in_memory"].output
        shared.mul_(3)
        return shared

    seen, result = in_two(reshaped, late)
    assert seen.tolist() == [[3.0] * 3]
    assert torch.equal(result, in_two(reshaped, nothing)[1])


def test_who_reads_what_is_shared_is_not_blamed_for_the_change_of_another(reshaped):
    def read():
        shared = reshaped.at["shared"].output
        reshaped.at["scalar"].output
        return shared

    def in_place():
        reshaped.at["shared"].output.mul_(3)

    with reshaped.trace() as tracer:
        shared = tracer.invoke(NESTED[0], read)
        tracer.invoke(NESTED[1], nothing)
        tracer.invoke(in_place)
    assert shared.result.tolist() == [[1.0] * 3]  # as it was when it was read
    assert torch.equal(tracer.result, torch.cat(NESTED) * 3)


def test_rows_that_are_one_in_memory_are_replaced_and_not_changed_in_place(reshaped):
    """`expand` makes rows that share their memory: torch lets a single one be written to, and with it all."""

    def one_row(function):
        with reshaped.trace() as tracer:
            invoke = tracer.invoke(NESTED[0], function)
            tracer.invoke(NESTED[1], nothing)
        return invoke.result, tracer.result

    def replace():
        at = reshaped.at["one_in_memory"]
        at.output = at.output * 3

    def in_place():
        reshaped.at["one_in_memory"].output.mul_(3)

    assert torch.equal(one_row(lambda: reshaped.at["one_in_memory"].output)[0], torch.ones(1, 3))
    assert torch.equal(one_row(replace)[1], torch.cat((NESTED[0] * 3, NESTED[1])))
    with pytest.raises(EditError) as caught:
        one_row(in_place)
    assert str(caught.value).splitlines()[0] == (
        "`model.at.one_in_memory.output` was changed in place in invoke 1 ([1, 3, 2] float32), and all invokes share it."
    )


def test_who_sees_all_rows_may_change_what_they_share(reshaped):
    def in_place():
        reshaped.at["shared"].output.add_(1)

    with reshaped.trace() as tracer:
        for x in NESTED:
            tracer.invoke(x, nothing)
        tracer.invoke(in_place)
    assert torch.equal(tracer.result, torch.cat(NESTED) * 2)


class Mixture(torch.nn.Module):
    """Gives each of two experts as many rows as there are, in an order of its own."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        return sum(expert(x.flip(0)) for expert in self.experts).flip(0)


def test_the_rows_that_are_routed_to_an_expert_are_not_taken_for_an_invokes_own():
    model = NNsight(Mixture())

    def refused():
        with pytest.raises(RowsError):
            model.experts[1].input
        with pytest.raises(EditError):
            model.experts[1].output = torch.zeros(1, 4)

    with model.trace() as tracer:
        tracer.invoke(A, refused)
        tracer.invoke(B, nothing)
    assert close(tracer.result, model._module(torch.cat((A, B))))


class Methods(torch.nn.Module):
    """Has a submodule called as a method of the tree is."""

    def __init__(self):
        super().__init__()
        self.trace = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.trace(x)


def test_a_submodule_called_trace_is_read_in_an_invoke_and_does_not_hide_the_method():
    model = NNsight(Methods())
    with model.trace() as tracer:
        one = tracer.invoke(A, lambda: model.trace_.output)
        two = tracer.invoke(B, lambda: model["trace"].output)
    assert close(torch.cat((one.result, two.result)), model._module(torch.cat((A, B))))


@pytest.mark.parametrize(
    ("options", "repeats"),
    [
        ({"num_beams": 3}, 3),
        ({"do_sample": True, "num_return_sequences": 2}, 2),
        ({"num_beams": 4, "num_return_sequences": 2}, 4),
    ],
    ids=["beams", "sequences", "beams and sequences"],
)
def test_beams_and_sequences_are_the_rows_of_their_prompt(gpt2, options, repeats):
    def plain():
        torch.manual_seed(0)
        encoded = gpt2.tokenizer(PROMPTS[:2], padding=True, padding_side="left", return_tensors="pt")
        gpt2._module.generate(**encoded, max_new_tokens=3, pad_token_id=0, **options)

    gpt2.tokenizer.pad_token = gpt2.tokenizer.eos_token
    gpt2.dispatch()
    [seen] = hooked(gpt2._module, plain, "transformer.h.1.mlp")
    torch.manual_seed(0)
    with gpt2.generate(max_new_tokens=3, **options) as tracer:
        one, two = (
            tracer.invoke(prompt, lambda: [gpt2.transformer.h[1].mlp.output.clone() for _ in tracer.iter[:]])
            for prompt in PROMPTS[:2]
        )
    assert len(one.result) == len(two.result) == len(seen)
    assert all(
        close(torch.cat(rows), whole) for rows, whole in zip(zip(one.result, two.result, strict=True), seen, strict=True)
    )
    assert one.result[0].shape[0] == repeats


def test_hidden_states_are_asked_of_the_trace_and_refused_in_an_invoke(gpt2):
    with pytest.raises(BatchError) as caught, gpt2.trace() as tracer:
        for prompt in PROMPTS:
            tracer.invoke(prompt, output_hidden_states=True)(nothing)
    assert str(caught.value) == (
        "`output_hidden_states` cannot be given for one input: it has no rows, so it would apply to all of them.\n"
        "Give it to the trace: `model.trace(output_hidden_states=...)`."
    )
    with gpt2.trace(output_hidden_states=True) as tracer:
        own = [tracer.invoke(prompt, lambda: gpt2.output.hidden_states) for prompt in PROMPTS]
    for row, invoke in enumerate(own):
        for part, whole in zip(invoke.result, tracer.result.hidden_states, strict=True):
            assert torch.equal(part, whole[row : row + 1])


# Waiting for each other


def test_a_barrier_lets_bodies_meet_again_and_again(model):
    events = []
    with model.trace() as tracer:
        barrier = tracer.barrier(2)

        def early():
            for layer in (0, 1):
                model.h[layer].output
                events.append(f"early has {layer}")
                barrier()

        def late():
            for layer in (1, 2):
                model.h[layer].output
                events.append(f"late has {layer}")
                barrier()

        tracer.invoke(A, early)
        tracer.invoke(B, late)
    assert events == ["early has 0", "late has 1", "early has 1", "late has 2"]


def test_a_barrier_nobody_else_comes_to_says_who_is_missing(model):
    with pytest.raises(DeadlockError) as caught, model.trace() as tracer:
        barrier = tracer.barrier(3)
        tracer.invoke(A, barrier)
        tracer.invoke(B, barrier)
        tracer.invoke(C, nothing)
    place = "`tracer.barrier(3)`, at which 3 invokes have to meet"
    assert str(caught.value) == (
        f"No invoke can go on: invoke 1 ([1, 4] float32) waits for {place}; invoke 2 ([1, 4] float32) waits for {place}. "
        "invoke 3 ([2, 4] float32) has ended without it.\n"
        "Have every party of a barrier come to it, and bind a name in an earlier invoke above what waits for it."
    )
    assert caught.value.waiting == ["invoke 1 ([1, 4] float32)", "invoke 2 ([1, 4] float32)"]


def test_a_barrier_of_one_is_no_obstacle_and_of_none_is_refused(model):
    with model.trace() as tracer:
        barrier = tracer.barrier(1)
        tracer.invoke(A, lambda: (barrier(), barrier()))
        with pytest.raises(RunError, match="waits for nobody"):
            tracer.barrier(0)


def test_two_bodies_that_wait_at_different_barriers_are_both_named(model):
    with pytest.raises(DeadlockError) as caught, model.trace() as tracer:
        one, two = tracer.barrier(2), tracer.barrier(2)
        tracer.invoke(A, one)
        tracer.invoke(B, lambda: (model.h[0].output, two()))
    assert caught.value.waiting == ["invoke 1 ([1, 4] float32)", "invoke 2 ([1, 4] float32)"]


def test_a_body_may_catch_that_nobody_comes_and_go_on(model):
    def wait():
        with pytest.raises(DeadlockError):
            barrier()
        return model.head.output

    with model.trace() as tracer:
        barrier = tracer.barrier(2)
        head = tracer.invoke(A, wait)
        tracer.invoke(B, nothing)
    assert close(head.result, model._module(A))


# Ends


def test_stop_ends_its_own_body_and_the_others_run_to_their_ends(model):
    reached = []

    def stopped():
        model.h[0].output
        reached.append("stop")
        tracer.stop()
        reached.append("behind stop")

    with model.trace() as tracer:
        first = tracer.invoke(A, stopped)
        second = tracer.invoke(B, lambda: model.h[2].output)
    assert reached == ["stop"]
    assert first.result is None
    assert close(second.result, outputs(model, B, "h.2")[0])
    assert close(tracer.result, model._module(torch.cat((A, B))))


def test_nothing_is_computed_behind_the_last_point_that_is_wanted_when_every_body_has_stopped(model):
    def run():
        with model.trace() as tracer:
            tracer.invoke(A, lambda: (model.h[0].output, tracer.stop()))
            tracer.invoke(B, lambda: (model.h[1].output, tracer.stop()))
        with pytest.raises(RunEndedError):
            tracer.result

    ran = hooked(model._module, run, "h.0", "h.1", "h.2")
    assert [len(each) for each in ran] == [1, 1, 0]


def test_a_failing_forward_raises_at_the_line_that_waits_and_names_every_edit(model):
    def bad():
        model.h[0].output = torch.ones(3, 9)

    with pytest.raises(RuntimeError) as caught, model.trace() as tracer:
        tracer.invoke(A, nothing)
        tracer.invoke(B, lambda: model.head.output)
        tracer.invoke(bad)
    lines = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__) if frame.filename == __file__]
    assert "<lambda>" in lines
    running, edited = caught.value.__notes__
    assert running == "The model was running `model.h[1].lin`."
    code = bad.__code__
    assert edited == (
        "Edited before: `model.h[0].output` in step 0: [2, 4] float32 became [3, 9] float32 "
        f"({code.co_filename}, line {code.co_firstlineno + 1})"
    )


def test_a_forward_that_fails_when_no_body_waits_raises_behind_the_block(model):
    def bad():
        model.h[0].output = torch.ones(3, 9)

    with pytest.raises(RuntimeError) as caught, model.trace() as tracer:
        tracer.invoke(A, nothing)
        tracer.invoke(bad)
    assert len(caught.value.__notes__) == 2


@pytest.fixture
def blocks():
    return NNsight(torch.nn.Sequential(Block(), Block()))


def three(seed):
    return torch.randn(seed, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ending", ["finished", "raised", "stopped", "refused", "failed", "deadlocked", "never begun"])
def test_however_a_trace_of_invokes_ends_the_model_is_as_it_was(blocks, ending):
    ended = []

    def first():
        try:
            blocks[0].first.output
            if ending == "raised":
                raise KeyError("mine")
            if ending == "stopped":
                tracer.stop()
            if ending == "refused":
                blocks[0].first.output = torch.ones(5)
            if ending == "deadlocked":
                tracer.barrier(2)()
            blocks[1].output
        finally:
            ended.append("first")

    def second():
        try:
            blocks[0].second.output
            if ending == "failed":
                blocks[1].first.input = torch.ones(1, 7)
        finally:
            ended.append("second")

    with as_before(blocks), contextlib.suppress(KeyError, EditError, DeadlockError, ZeroDivisionError):
        with blocks.trace() as tracer:
            tracer.invoke(three(1), first)
            tracer.invoke(three(2), second)
            if ending == "never begun":
                _ = 1 / 0
        assert ending in ("finished", "stopped")
    assert sorted(ended) == ([] if ending == "never begun" else ["first", "second"])


def test_an_exception_shows_the_lines_of_the_body_and_no_frames_of_torch(model):
    def body():
        model.h[0].output
        raise KeyError("mine")

    with pytest.raises(KeyError) as caught, model.trace() as tracer:
        tracer.invoke(A, body)
    assert all(frame.filename == __file__ for frame in traceback.extract_tb(caught.value.__traceback__))


# Traces and calls inside a body


def test_a_body_may_trace_and_call_the_same_model(model):
    def body():
        before = model.h[0].output
        with model.trace(C):
            inner = model.h[0].output
        with model.trace() as nested:
            rows = nested.invoke(A, lambda: model.h[1].output)
            nested.invoke(C, nothing)
        return before, inner, model._module(A), rows.result, model.h[1].output

    with model.trace() as tracer:
        own = tracer.invoke(B, body)
        other = tracer.invoke(A, lambda: model.head.output)
    before, inner, raw, rows, after = own.result
    assert close(torch.cat((before, after)), torch.cat(outputs(model, B, "h.0", "h.1")))
    assert close(inner, outputs(model, C, "h.0")[0])
    assert torch.equal(raw, model._module(A))
    assert close(rows, outputs(model, A, "h.1")[0])
    assert close(other.result, raw)


def test_a_module_applied_in_a_body_does_not_move_the_run(model):
    with model.trace() as tracer:
        lens = tracer.invoke(A, lambda: model.head(model.h[0].output))
        tracer.invoke(B, nothing)
    assert close(lens.result, model._module.head(outputs(model, A, "h.0")[0]))


# What cannot be written


def test_a_point_outside_every_invoke_is_refused(model):
    with pytest.raises(OutsideTraceError) as caught, model.trace() as tracer:
        tracer.invoke(A, nothing)
        model.h[0].output
    assert str(caught.value) == (
        "`model.h[0].output` was read outside every invoke, and its trace has no input of its own.\n"
        'Read it inside `with tracer.invoke("…"):`, or give the trace an input: `with model.trace("…"):`.'
    )


def test_an_invoke_in_a_trace_with_input_is_refused(model):
    with pytest.raises(InvokeError) as caught, model.trace(A) as tracer:
        tracer.invoke(B, nothing)
    assert str(caught.value) == (
        "This trace has an input of its own, so it cannot have invokes.\n"
        "Write `with model.trace() as tracer:` and give each prompt to `tracer.invoke(...)`."
    )


@pytest.mark.parametrize("written", ["nothing", "a body for all rows"])
def test_a_trace_with_neither_an_input_nor_an_invoke_with_one_is_refused(model, written):
    with pytest.raises(InputError) as caught, model.trace() as tracer:
        if written != "nothing":
            tracer.invoke(nothing)
    assert str(caught.value) == (
        "The trace has no input.\n"
        'Pass a prompt, as in `model.trace("The Eiffel Tower")`, or give one to `tracer.invoke(...)` in its block.'
    )


def test_an_invoke_without_a_block_is_refused(model):
    with pytest.raises(InvokeError) as caught, model.trace() as tracer:
        tracer.invoke(A)
    assert str(caught.value) == (
        "Invoke 1 ([1, 4] float32) has no block.\n"
        "Write `with tracer.invoke(...):`, or pass a function: `tracer.invoke(prompt, function)`."
    )


def test_an_invoke_given_two_blocks_is_refused(model):
    with pytest.raises(InvokeError) as caught, model.trace() as tracer:
        tracer.invoke(A, nothing)(nothing)
    assert str(caught.value) == "Invoke 1 ([1, 4] float32) has a block already.\nCall `tracer.invoke(...)` for each."


@pytest.mark.parametrize("batched", [True, False])
def test_an_invoke_inside_another_is_refused(model, batched):
    with pytest.raises(InvokeError), model.trace(batched=batched) as tracer:
        tracer.invoke(A, lambda: tracer.invoke(B, nothing))


def test_an_invoke_behind_its_trace_is_refused(model):
    with model.trace() as tracer:
        tracer.invoke(A, nothing)
    with pytest.raises(InvokeError) as caught:
        tracer.invoke(B, nothing)
    assert str(caught.value).splitlines()[0] == "An invoke was opened inside another, or behind the end of its trace."


def a_generator():
    yield


async def a_coroutine():
    pass


@pytest.mark.parametrize("function", [a_generator, a_coroutine])
def test_what_would_not_run_when_it_is_called_is_refused(model, function):
    with pytest.raises(InvokeError) as caught, model.trace() as tracer:
        tracer.invoke(A, function)
    assert str(caught.value) == (
        f"`tracer.invoke(...)` was given {function!r} to run.\nGive it a plain function that takes no arguments."
    )


def test_one_by_one_nobody_sees_all_rows(model):
    with pytest.raises(InvokeError) as caught, model.trace(batched=False) as tracer:
        tracer.invoke(nothing)
    assert str(caught.value).splitlines()[0] == (
        "`tracer.invoke()` without input sees the rows of all invokes, and with `batched=False` each runs alone."
    )


# Edits


@pytest.mark.parametrize("batched", [True, False])
def test_a_module_skipped_in_one_invoke_runs_for_the_others(model, batched):
    def skip():
        model.h[1].skip(model.h[1].input * 0)

    with model.trace(batched=batched) as tracer:
        tracer.invoke(A, skip)
        tracer.invoke(B, nothing)
    module = model._module
    result = tracer.result if batched else torch.cat(tracer.result)
    assert close(result, torch.cat((module.head(module.h[2](A * 0)), module(B))))


def test_a_module_skipped_for_all_rows_does_not_run(model):
    def skip():
        model.h[1].skip(model.h[1].input)

    def run():
        with model.trace() as tracer:
            tracer.invoke(A, nothing)
            tracer.invoke(B, nothing)
            tracer.invoke(skip)
        return tracer.result

    x, module = torch.cat((A, B)), model._module
    assert close(run(), module.head(module.h[2](module.h[0](x))))
    [inside] = hooked(module, run, "h.1.lin")
    assert not inside


@pytest.mark.parametrize("kind", ["input", "inputs", "output", "hidden"])
def test_a_replacement_of_another_shape_is_refused_at_its_line_and_the_run_goes_on(model, kind):
    def bad():
        _ = getattr(model.h[1], kind)
        with pytest.raises(EditError):
            setattr(model.h[1], kind, ((torch.ones(2, 4),), {}) if kind == "inputs" else torch.ones(2, 4))

    with model.trace() as tracer:
        tracer.invoke(A, bad)
        tracer.invoke(B, nothing)
    assert close(tracer.result, model._module(torch.cat((A, B))))


def test_the_gradient_of_an_edit_in_one_invoke_is_that_of_its_own_run(model):
    scale = torch.tensor(2.0, requires_grad=True)

    def edit():
        model.h[0].output = model.h[0].output * scale

    with model.trace() as tracer:
        tracer.invoke(A, edit)
        tracer.invoke(B, nothing)
    module = model._module
    hand = module.head(module.h[2](module.h[1](module.h[0](A) * scale)))
    ours, others, wanted = (
        torch.autograd.grad(value.square().sum(), scale, retain_graph=True)[0] for value in (*tracer.result, hand)
    )
    assert close(ours, wanted)
    assert others == 0


def test_dropout_in_training_draws_for_the_whole_batch_and_each_body_sees_its_rows():
    model = NNsight(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)).train())
    torch.manual_seed(0)
    with model.trace() as tracer:
        own = [tracer.invoke(x, lambda: model[1].output) for x in (A, B)]
    torch.manual_seed(0)
    want = model._module(torch.cat((A, B)))
    assert close(torch.cat([invoke.result for invoke in own]), want)
    assert close(tracer.result, want)


# Torch's settings, threads, memory


def test_what_one_body_sets_around_a_read_reaches_neither_the_model_nor_another_body(model):
    seen = {}

    def sets():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model.h[0].output
            seen["inside"] = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
            model.h[1].output
        seen["behind"] = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    def reads():
        for layer in (0, 1):
            hidden = model.h[layer].output
            seen[layer] = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), hidden.dtype, (hidden * 2).requires_grad

    with model.trace() as tracer:
        tracer.invoke(A, sets)
        tracer.invoke(B, reads)
    assert seen == {
        "inside": (False, True),
        "behind": (True, False),
        0: (True, False, torch.float32, True),
        1: (True, False, torch.float32, True),
    }
    assert tracer.result.dtype == torch.float32
    assert tracer.result.requires_grad
    assert (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")) == (True, False)


def test_a_body_begins_with_what_was_in_force_where_its_invoke_was_written(model):
    with model.trace() as tracer:
        with torch.no_grad():
            off = tracer.invoke(A, torch.is_grad_enabled)
        on = tracer.invoke(B, torch.is_grad_enabled)
    assert (off.result, on.result) == (False, True)


def test_threads_that_trace_one_model_with_invokes_do_not_see_each_other(model):
    failures = []

    def work(number):
        x = torch.full((1, 4), float(number))
        want = model._module.h[1](model._module.h[0](x))
        try:
            for _ in range(20):
                with model.trace() as tracer:
                    own = tracer.invoke(x, lambda: model.h[1].output)
                    tracer.invoke(x + 1, lambda: setattr(model.h[0], "output", model.h[0].output * 0))
                assert close(own.result, want)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def one_trace(blocks, x):
    def edit():
        blocks[0].first.output = blocks[0].first.output * 2
        return blocks[1].output

    with blocks.trace() as tracer:
        tracer.invoke(x, edit)
        tracer.invoke(x, lambda: blocks[1].first.output.shape)
        with tracer.invoke():
            blocks[1].output


def test_many_traces_with_invokes_leave_no_objects_behind(blocks):
    x = three(2)
    for _ in range(20):
        one_trace(blocks, x)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(200):
        one_trace(blocks, x)
    gc.collect()
    assert len(gc.get_objects()) - before < 100


@pytest.mark.parametrize("ending", ["finished", "stopped", "raised"])
def test_what_a_body_has_read_is_freed_with_its_trace(blocks, ending):
    alive = []

    def read():
        alive.append(weakref.ref(blocks[0].first.output))
        alive.append(weakref.ref(blocks[1].output))
        if ending == "stopped":
            tracer.stop()
        if ending == "raised":
            raise KeyError

    with contextlib.suppress(KeyError), blocks.trace() as tracer:
        tracer.invoke(three(2), read)
        tracer.invoke(three(3), lambda: blocks[1].output.shape)
    tracer = None
    gc.collect()
    assert [each() for each in alive] == [None, None]


# Generation


def alone(gpt2, prompt, **options):
    """What the prompt generates alone, and what a plain hook sees at each step."""
    encoded = gpt2.tokenizer(prompt, return_tensors="pt")
    made = []
    [seen] = hooked(
        gpt2._module,
        lambda: made.append(gpt2._module.generate(**encoded, do_sample=False, pad_token_id=0, **options)),
        "lm_head",
    )
    return made[0][0, encoded["input_ids"].shape[1] :].tolist(), [each[:, -1] for each in seen]


def test_each_body_loops_over_the_steps_and_reads_its_own_rows(gpt2):
    gpt2.dispatch()
    with gpt2.generate(max_new_tokens=4, min_new_tokens=4, do_sample=False) as tracer:
        read = [
            tracer.invoke(prompt, lambda: [gpt2.lm_head.output[:, -1].clone() for _ in tracer.iter[:]]) for prompt in PROMPTS
        ]
    for invoke, prompt in zip(read, PROMPTS, strict=True):
        _, seen = alone(gpt2, prompt, max_new_tokens=4, min_new_tokens=4)
        assert len(invoke.result) == len(seen) == 4
        assert all(map(close, invoke.result, seen))


def test_bodies_may_be_at_different_steps_and_end_with_the_generation(gpt2):
    gpt2.dispatch()

    def at(selection):
        def read():
            steps = [(step, gpt2.lm_head.output[:, -1].clone()) for step in tracer.iter[selection]]
            return steps, "behind the loop"

        return read

    selections = [slice(0, 5, 2), [1], slice(3, None)]
    with gpt2.generate(max_new_tokens=5, min_new_tokens=5, do_sample=False) as tracer:
        read = [tracer.invoke(prompt, at(chosen)) for prompt, chosen in zip(PROMPTS, selections, strict=True)]
    for invoke, prompt, steps in zip(read, PROMPTS, ([0, 2, 4], [1], [3, 4]), strict=True):
        _, seen = alone(gpt2, prompt, max_new_tokens=5, min_new_tokens=5)
        got, behind = invoke.result
        assert behind == "behind the loop"
        assert [step for step, _ in got] == steps
        assert all(close(value, seen[step]) for step, value in got)


def test_an_edit_at_chosen_steps_of_one_invoke_changes_what_it_generates_and_nothing_else(gpt2):
    gpt2.dispatch()
    step_of = iter(range(10))

    def zero(module, args, output):
        return output * 0 if next(step_of) in (1, 3) else output

    def edit():
        for _ in tracer.iter[1:5:2]:
            gpt2.transformer.h[1].mlp.output *= 0

    with gpt2.generate(max_new_tokens=5, min_new_tokens=5, do_sample=False) as tracer:
        tracer.invoke(PROMPTS[0], edit)
        tracer.invoke(PROMPTS[1], nothing)
    handle = gpt2._module.transformer.h[1].mlp.register_forward_hook(zero)
    edited, _ = alone(gpt2, PROMPTS[0], max_new_tokens=5, min_new_tokens=5)
    handle.remove()
    plain, _ = alone(gpt2, PROMPTS[1], max_new_tokens=5, min_new_tokens=5)
    assert tracer.result[0, -5:].tolist() == edited
    assert tracer.result[1, -5:].tolist() == plain
    assert edited != alone(gpt2, PROMPTS[0], max_new_tokens=5, min_new_tokens=5)[0]


def test_a_row_that_ends_early_is_padded_and_the_loops_go_on_with_the_batch(gpt2):
    gpt2.dispatch()
    tokens = [alone(gpt2, prompt, max_new_tokens=6, eos_token_id=-1)[0] for prompt in PROMPTS]
    end = next(token for row in tokens for token in row[:3] if any(token not in other for other in tokens))
    with gpt2.generate(max_new_tokens=6, do_sample=False, eos_token_id=end) as tracer:
        steps = [tracer.invoke(prompt, lambda: [*tracer.iter[:]]) for prompt in PROMPTS]
    lengths = [row.index(end) + 1 if end in row else 6 for row in tokens]
    assert min(lengths) < max(lengths)
    assert [invoke.result for invoke in steps] == [[*range(max(lengths))]] * 3
    for row, length, wanted in zip(tracer.result, lengths, tokens, strict=True):
        made = row[-max(lengths) :].tolist()
        assert made[:length] == wanted[:length]
        assert made[length:] == [0] * (max(lengths) - length)


def test_the_ids_of_the_generation_are_the_whole_batchs_in_every_invoke(gpt2):
    with gpt2.generate(max_new_tokens=3) as tracer:
        one = tracer.invoke(PROMPTS[0], lambda: gpt2.generator.output)
        two = tracer.invoke(PROMPTS[1], lambda: tracer.result)
    assert one.result is two.result is tracer.result
    assert len(tracer.result) == 2


def test_stop_in_one_body_of_a_generation_leaves_the_loops_of_the_others(gpt2):
    gpt2.dispatch()

    def stopped():
        for step in tracer.iter[:]:
            if step == 1:
                tracer.stop()

    with gpt2.generate(max_new_tokens=4, min_new_tokens=4) as tracer:
        tracer.invoke(PROMPTS[0], stopped)
        other = tracer.invoke(PROMPTS[1], lambda: [*tracer.iter[:]])
    assert other.result == [0, 1, 2, 3]


def test_a_barrier_in_each_step_carries_values_from_row_to_row(gpt2):
    """The second prompt's last hidden state becomes the first's, step by step: both go on with the same token."""
    gpt2.dispatch()
    held = {}

    def give():
        for _ in tracer.iter[:]:
            held["hidden"] = gpt2.transformer.h[2].hidden[:, -1].clone()
            barrier()

    def take():
        for _ in tracer.iter[:]:
            layer = gpt2.transformer.h[2]
            _ = layer.hidden
            barrier()
            layer.hidden[:, -1] = held["hidden"]

    with gpt2.generate(max_new_tokens=4, min_new_tokens=4, do_sample=False) as tracer:
        barrier = tracer.barrier(2)
        tracer.invoke(PROMPTS[0], take)
        tracer.invoke(PROMPTS[1], give)
    assert (
        tracer.result[0, -4:].tolist()
        == tracer.result[1, -4:].tolist()
        == alone(gpt2, PROMPTS[1], max_new_tokens=4, min_new_tokens=4)[0]
    )


def test_a_point_that_has_run_in_this_step_is_refused_in_the_body_that_asks_and_the_others_go_on(gpt2):
    def late():
        for step in tracer.iter[:]:
            gpt2.lm_head.output
            if step == 1:
                with pytest.raises(OutOfOrderError) as caught:
                    gpt2.transformer.h[0].output
                return caught.value.step
        return None

    with gpt2.generate(max_new_tokens=3, min_new_tokens=3) as tracer:
        step = tracer.invoke(PROMPTS[0], late)
        other = tracer.invoke(PROMPTS[1], lambda: [gpt2.lm_head.output.shape[0] for _ in tracer.iter[:]])
    assert step.result == 1
    assert other.result == [1, 1, 1]


def test_an_encoder_is_read_in_its_invoke_before_the_steps(folder):
    model = LanguageModel(folder("t5")).dispatch()

    def read():
        encoded = model.encoder.output.last_hidden_state
        return encoded, [model.lm_head.output[:, -1].clone() for _ in tracer.iter[:]]

    with model.generate(max_new_tokens=3, min_new_tokens=3, num_beams=2) as tracer:
        both = [tracer.invoke(prompt, read) for prompt in PROMPTS[:2]]
    for invoke, prompt in zip(both, PROMPTS[:2], strict=True):
        ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
        encoded, steps = invoke.result
        assert close(encoded[:, : ids.shape[1]], model._module.encoder(ids).last_hidden_state)
        assert [each.shape[0] for each in steps] == [2, 2, 2]


def test_what_is_asked_of_the_trace_in_the_wrong_place_is_a_sentence(model):
    def barrier_outside(tracer):
        tracer.barrier(2)()

    def rows(tracer):
        tracer.invoke(A, rows=1)

    said = {rows: "`rows=1` is not known.", barrier_outside: "was read outside every invoke, and its trace has no input"}
    for wrong, sentence in said.items():
        with pytest.raises((InvokeError, OutsideTraceError)) as caught, model.trace() as tracer:
            with tracer.invoke(A):
                model.h[0].output
            wrong(tracer)
        assert sentence in str(caught.value)
    assert repr(model.trace().barrier(2)) == "tracer.barrier(2): 0 waiting"


def test_a_barrier_of_invokes_that_run_one_after_another_holds_nobody_up(model):
    seen = []
    with model.trace(batched=False) as tracer:
        meet = tracer.barrier(2)
        for given in (A, B):
            with tracer.invoke(given):
                seen.append(model.h[0].output)
                meet()
                seen.append(model.h[1].output)
    expected = [
        each for given in (A, B) for each in hooked(model._module, lambda given=given: model._module(given), "h.0", "h.1")
    ]
    assert all(one.equal(other[0]) for one, other in zip(seen, expected, strict=True))


@pytest.mark.parametrize("kind", ["async", "generator", "with an argument"])
def test_a_callable_object_that_would_not_run_when_it_is_called_is_refused(model, kind):
    class Async:
        async def __call__(self): ...

    class Generator:
        def __call__(self):
            yield

    class Argument:
        def __call__(self, needed): ...

    made = {"async": Async().__call__, "generator": Generator().__call__, "with an argument": Argument()}[kind]
    with pytest.raises(InvokeError), model.trace() as tracer:
        tracer.invoke(A, made)


def test_a_forward_that_fails_behind_the_last_read_of_an_invoke_in_place_is_an_error_at_its_block(model):
    with (
        pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught,
        model.trace(batched=False) as tracer,
        tracer.invoke(A),
    ):
        model.h[0].output = torch.ones(1, 3)
    assert [entry.path.name for entry in caught.traceback if "nnsight_eager" in str(entry.path.parent)] == []
    assert "Edited before: `model.h[0].output`" in "\n".join(caught.value.__notes__)
