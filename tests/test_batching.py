"""Several inputs as one batch, and each invoke's rows of any value in it."""

import collections

import pytest
import torch
from small_models import X4, Stack
from transformers.modeling_outputs import BaseModelOutput

from nnsight_eager import NNsight
from nnsight_eager.batching import Given, Rows, divided, factors_in, is_routed, joined
from nnsight_eager.errors import BatchError, EditError, RowsError
from nnsight_eager.nested import tensors

Pair = collections.namedtuple("Pair", "left right")
SECOND = Rows(1, 3, 4)


def known(*factors):
    """What a run knows: by what the number of rows may be multiplied."""
    return lambda total: set(factors)


def point():
    return "model.a.output"


"""Rows 1 and 2 of a batch of four."""


def numbered(*shape):
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


# Rows


def test_a_batch_is_divided_in_the_order_of_the_inputs():
    assert divided([2, 1, 3]) == [Rows(0, 2, 6), Rows(2, 3, 6), Rows(3, 6, 6)]


@pytest.mark.parametrize(
    ("size", "factors", "rows"),
    [
        (4, set(), slice(1, 3)),
        (8, {2}, slice(2, 6)),
        (40, {2, 10}, slice(10, 30)),
        (8, set(), None),
        (8, {3}, None),
        (6, {2}, None),
        (2, {2}, None),
        (1, {1}, None),
        (0, {0}, slice(0, 0)),
    ],
)
def test_rows_are_found_by_the_size_of_dimension_0_and_the_factors_that_are_known(size, factors, rows):
    assert SECOND.of(torch.zeros(size, 3), known(*factors)) == rows


def test_a_number_has_no_rows_whatever_it_says():
    assert SECOND.of(torch.tensor(4), known(1)) is None


@pytest.mark.parametrize(
    "value",
    [torch.zeros(5, 4), torch.zeros(8), (torch.zeros(5, 4), None), {"a": torch.zeros(3)}, [torch.zeros(6), torch.zeros(1)]],
    ids=["tensor", "no such factor", "tuple", "dict", "beside a shared one"],
)
def test_what_has_no_rows_and_is_not_shared_is_refused(value):
    with pytest.raises(RowsError) as caught:
        SECOND.seen(value, known(), point)
    assert caught.value.asked == "model.a.output"


def test_a_refusal_says_what_was_found_and_how_to_see_all_of_it():
    with pytest.raises(RowsError) as caught:
        SECOND.seen(torch.zeros(5, 4), known(2), point)
    assert str(caught.value) == (
        "The rows of this invoke in `model.a.output` cannot be told: it is [5, 4] float32, and the batch has 4 rows.\n"
        "Read it in an invoke that sees all rows: `with tracer.invoke():`, or a function with "
        "`tracer.invoke(prompt, function, rows=None)`."
    )


@pytest.mark.parametrize("value", [torch.zeros(1, 9), torch.tensor(2.0), None, 3, (torch.zeros(1), "text"), ()], ids=repr)
def test_what_is_the_same_for_every_row_is_seen_as_it_is(value):
    assert SECOND.seen(value, known(), point) is value


def test_in_a_structure_what_has_rows_is_narrowed_and_the_rest_shared():
    bias, hidden = torch.zeros(5, 5), numbered(4, 2)
    seen = SECOND.seen(BaseModelOutput(last_hidden_state=hidden, hidden_states=(bias, hidden)), known(), lambda: "model.output")
    assert torch.equal(seen.last_hidden_state, hidden[1:3])
    assert seen.hidden_states[0] is bias
    assert torch.equal(seen.hidden_states[1], hidden[1:3])


def test_who_has_every_row_sees_and_writes_whatever_there_is():
    everything, value, new = Rows(0, 4, 4), torch.zeros(7), torch.ones(2)
    assert everything.seen(value, known(), point) is value
    assert everything.written(value, new, known(), point) is new


@pytest.mark.parametrize(("size", "factors"), [(4, set()), (8, {2}), (24, {2, 6})])
def test_rows_that_are_written_are_the_rows_that_are_seen_and_no_others(size, factors):
    whole = numbered(size, 3)
    seen = SECOND.seen(whole, known(*factors), point)
    written = SECOND.written(whole, seen * 0 - 1, known(*factors), point)
    each = size // 4
    assert seen.tolist() == whole.tolist()[each : 3 * each]
    assert written.tolist() == [*whole.tolist()[:each], *[[-1.0] * 3] * (2 * each), *whole.tolist()[3 * each :]]
    assert torch.equal(whole, numbered(size, 3))


@pytest.mark.parametrize(
    ("whole", "part", "said"),
    [
        (torch.zeros(4, 2), torch.zeros(4, 2), "[4, 2] float32 in the place of [2, 2] float32"),
        (torch.zeros(1, 2), torch.ones(1, 2), "a new value for [1, 2] float32, which all invokes share"),
        (torch.zeros(5), torch.zeros(2), "a new value for [5] float32, which all invokes share"),
        ((torch.zeros(4), 1), (torch.zeros(2), 2), "int in the place of int, which all invokes share"),
    ],
    ids=["all rows", "size 1", "no rows", "a number beside rows"],
)  # fmt: skip
def test_a_write_that_does_not_fit_the_rows_is_refused(whole, part, said):
    with pytest.raises(EditError) as caught:
        SECOND.written(whole, part, known(), point)
    happened, instead = str(caught.value).splitlines()
    assert happened == f"`model.a.output` was given {said}."
    assert instead == (
        "An invoke replaces its own rows, with a value of their shape; `with tracer.invoke():` sees and replaces all."
    )


@pytest.mark.parametrize("value", [torch.zeros(4, 2), torch.zeros(1, 2), (torch.zeros(4, 2), torch.zeros(1))], ids=str)
def test_where_no_size_tells_rows_even_one_that_fits_is_refused(value):
    with pytest.raises(RowsError):
        SECOND.seen(value, None, point)
    with pytest.raises(EditError):
        SECOND.written(torch.zeros(4, 2), torch.ones(2, 2), None, point)


@pytest.mark.parametrize(
    ("path", "routed"),
    [
        ("model.layers.0.mlp.experts.0", True),
        ("model.layers.0.mlp.experts.act_fn", True),
        ("model.layers.0.mlp.experts", False),
        ("model.layers.0.mlp.shared_expert.up_proj", False),
        ("", False),
    ],
)
def test_what_is_inside_experts_gets_the_tokens_routed_to_it(path, routed):
    assert is_routed(path) is routed


# Factors


@pytest.mark.parametrize(
    ("arguments", "factors"),
    [
        ({"input_ids": torch.zeros(4, 7)}, {1, 7}),
        ({"input_ids": torch.zeros(8, 7)}, {2, 14}),
        (((torch.zeros(4, 7, 32),), {"mask": torch.zeros(4, 1, 7, 7)}), {1, 7}),
        ({"ids": torch.zeros(12, 5), "encoded": torch.zeros(12, 9, 32)}, {3, 15, 27}),
        ({"position": torch.zeros(4), "mask": torch.zeros(1, 1, 7, 7), "text": "a"}, set()),
        ({"odd": torch.zeros(6, 5), "empty": torch.zeros(0, 4)}, set()),
    ],
    ids=["ids", "beams", "hidden states and a mask", "encoder and decoder", "no rows", "other sizes"],
)
def test_the_factors_are_beams_and_lengths_of_what_the_model_is_called_with(arguments, factors):
    assert factors_in(arguments, 4) == factors


# Arguments of plain modules


def test_tensors_of_plain_modules_are_put_one_below_the_other_in_whatever_they_are_wrapped():
    def numbers(rows, number):
        one = torch.full((rows, 2), float(number))
        return Given((one, (one + 1, None)), {"pair": Pair(one + 2, "same"), "more": {"a": [one + 3]}, "flag": True})

    together, sizes = joined([numbers(2, 10), numbers(1, 20)])
    assert sizes == [2, 1]
    assert [each.tolist() for each in tensors(together)] == [[[10 + n] * 2, [10 + n] * 2, [20 + n] * 2] for n in range(4)]
    assert together.kwargs["pair"].right == "same"
    assert isinstance(together.kwargs["pair"], Pair)
    assert together.kwargs["flag"] is True


def given(*args, **kwargs):
    return Given(args, kwargs)


def test_one_input_is_passed_as_it_is():
    x = torch.zeros(3, 2)
    together, sizes = joined([given(x, 5, a=None)])
    assert together.args[0] is x
    assert sizes == [3]


@pytest.mark.parametrize("shape", [(1, 4), (3, 4)])
def test_the_same_tensor_given_twice_is_two_inputs(shape):
    x = torch.ones(shape)
    together, sizes = joined([given(x, x), given(x, x)])
    assert sizes == [shape[0]] * 2
    assert all(torch.equal(each, torch.cat((x, x))) for each in together.args)


def test_a_tensor_of_one_row_that_is_given_beside_every_input_is_shared():
    mask, number = torch.ones(1, 4), torch.tensor(0.5)
    together, _ = joined([given(torch.ones(rows, 4), mask=mask, number=number) for rows in (1, 2)])
    assert together.kwargs["mask"] is mask
    assert together.kwargs["number"] is number


UNEQUAL = (
    "Give every invoke tensors of one shape but for dimension 0, override `batch` in a subclass of `NNsight`, or give "
    "each a forward pass of its own: `model.trace(batched=False)`."
)


@pytest.mark.parametrize(
    ("inputs", "what", "values"),
    [
        ([given(torch.zeros(1, 2)), given(X4)], "0 in the positional arguments", "[1, 2] float32, [1, 4] float32"),
        ([given(X4, scale=2), given(X4, scale=3)], "'scale' in the keywords", "int, int"),
        ([given(X4), given(X4, scale=3)], "The keywords", "dict, dict"),
        ([given(X4, X4), given(X4)], "The positional arguments", "([1, 4] float32, [1, 4] float32), ([1, 4] float32)"),
        ([given(torch.tensor(1)), given(torch.tensor(1))], "0 in the positional arguments", "[] int64, [] int64"),
    ],
    ids=["shapes", "numbers", "keywords", "how many", "no dimension"],
)  # fmt: skip
def test_inputs_that_do_not_fit_are_refused_with_both_ways_out(inputs, what, values):
    with pytest.raises(BatchError) as caught:
        joined(inputs)
    assert str(caught.value) == f"{what} of the invokes cannot be put into one batch: {values}.\n{UNEQUAL}"


def test_an_input_without_a_tensor_is_refused():
    with pytest.raises(BatchError) as caught:
        joined([given("The Eiffel Tower is in the city of Paris, and")])
    assert str(caught.value) == (
        "The input 'The Eiffel Tower is in the city of …' has no tensor, so it has no rows.\n"
        "Give each invoke its tensors, or override `batch` in a subclass of `NNsight`."
    )


class OfWords(NNsight):
    """Takes words, whose number of letters is put in four columns."""

    def batch(self, inputs):
        rows = [[len(word)] * 4 for each in inputs for word in each.args]
        return Given((torch.tensor(rows, dtype=torch.float32),), {}), [len(each.args) for each in inputs]


@pytest.mark.parametrize("batched", [True, False])
def test_a_subclass_says_how_its_inputs_become_a_batch(batched):
    model = OfWords(Stack())
    with model.trace(batched=batched) as tracer:
        two = tracer.invoke("one", "three", lambda: model.h[0].input.clone())
        one = tracer.invoke("seven!", lambda: model.head.output)
    assert two.result.tolist() == [[3.0] * 4, [5.0] * 4]
    assert torch.allclose(one.result, model._module(torch.full((1, 4), 6.0)))


def test_a_model_run_on_the_same_tensor_in_two_invokes_has_rows_for_each():
    model = NNsight(Stack())

    def zeroed():
        model.h[0].output = model.h[0].output * 0
        return model.head.output

    with model.trace() as tracer:
        edited = tracer.invoke(X4, zeroed)
        plain = tracer.invoke(X4, lambda: model.head.output)
    module = model._module
    assert torch.allclose(edited.result, module.head(module.h[2](module.h[1](X4 * 0))))
    assert torch.allclose(plain.result, module(X4))
