"""Tensors inside whatever a module returns."""

import collections
import copy
import dataclasses

import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from nnsight_eager import shapes
from nnsight_eager.nested import copied, first_tensor, items, narrow, splice, tensors, with_first_tensor

ONE, TWO = torch.zeros(1, 2), torch.zeros(3)
Pair = collections.namedtuple("Pair", "left right")


@dataclasses.dataclass
class Held:
    name: str
    value: torch.Tensor


CONTAINERS = [
    ONE,
    (ONE, TWO),
    [ONE, TWO],
    (None, (3, ONE), TWO),
    {"a": None, "b": ONE, "c": TWO},
    collections.OrderedDict(b=ONE, a=TWO),
    Pair(ONE, TWO),
    Held("x", ONE),
    BaseModelOutput(last_hidden_state=ONE, hidden_states=(ONE, TWO)),
    (BaseModelOutput(last_hidden_state=ONE), TWO),
]


@pytest.mark.parametrize("value", CONTAINERS, ids=lambda value: type(value).__name__)
def test_the_first_tensor_is_found_and_replaced_and_nothing_given_is_changed(value):
    before = [id(each) for each in tensors(value)]
    new = torch.ones(5)
    replaced = with_first_tensor(value, new)
    assert first_tensor(value) is ONE
    assert first_tensor(replaced) is new
    assert type(replaced) is type(value)
    assert [id(each) for each in tensors(value)] == before
    assert [id(each) for each in tensors(replaced)][1:] == before[1:]


def test_a_model_output_keeps_its_attributes_and_items_in_step():
    replaced = with_first_tensor(BaseModelOutput(last_hidden_state=ONE), TWO)
    assert replaced.last_hidden_state is replaced["last_hidden_state"] is replaced[0] is TWO


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 puts the items of a model output in another order")
def test_a_model_output_keeps_the_order_of_its_items():
    """A model may set its fields in any order, and then takes `output[0]` of them."""
    output = BaseModelOutput(hidden_states=(ONE,))
    output.last_hidden_state = TWO
    replaced = with_first_tensor(output, ONE + 1)
    assert list(replaced) == list(output) == ["hidden_states", "last_hidden_state"]
    assert torch.equal(replaced[0][0], ONE + 1)
    assert replaced[1] is TWO


def test_shapes_keep_the_form_of_the_value():
    assert repr(shapes((ONE, (TWO, None)))) == "(torch.Size([1, 2]), (torch.Size([3]), None))"
    assert shapes({"a": [ONE]}) == {"a": [ONE.shape]}
    assert shapes(Held("x", ONE)) == {"name": "x", "value": ONE.shape}
    assert shapes(BaseModelOutput(last_hidden_state=ONE)) == {"last_hidden_state": ONE.shape}
    assert shapes(3) == 3


def test_a_value_without_tensors_has_no_first_one():
    assert first_tensor({"a": (1, "b")}) is None
    with pytest.raises(LookupError):
        with_first_tensor((1, 2), ONE)


# Rows of a batch of three; the invoke has row 1.

ROW = slice(1, 2)


def where(tensor):
    return ROW if tensor.dim() and tensor.shape[0] == 3 else None


def numbered(*shape, start=0.0):
    return torch.arange(start, start + torch.Size(shape).numel()).reshape(shape)


def filled_cache(start=0.0):
    """A key/value cache of two layers, batch of three."""
    cache = DynamicCache()
    for layer in range(2):
        cache.update(numbered(3, 2, 4, 2, start=start + layer), numbered(3, 2, 4, 2, start=start + 50 + layer), layer)
    return cache


BATCHES = {
    "tensor": lambda: numbered(3, 2),
    "tuple": lambda: (numbered(3, 2), None, numbered(1, 2), 5),
    "list": lambda: [numbered(3), [numbered(3, 1, 2)]],
    "dict": lambda: {"a": numbered(3, 2), "b": "text", "c": numbered(2)},
    "ordered dict": lambda: collections.OrderedDict(b=numbered(3, 2), a=numbered(3)),
    "namedtuple": lambda: Pair(numbered(3, 2), (numbered(3, 1), numbered(1))),
    "dataclass": lambda: Held("x", numbered(3, 2)),
    "model output": lambda: BaseModelOutput(last_hidden_state=numbered(3, 2), hidden_states=(numbered(3, 1), numbered(3, 4))),
    "model output in a tuple": lambda: (BaseModelOutput(last_hidden_state=numbered(3, 2)), numbered(3)),
    "cache": filled_cache,
    "cache in a tuple": lambda: (numbered(3, 2), filled_cache()),
    "encoder and decoder cache": lambda: EncoderDecoderCache(filled_cache(), filled_cache(start=500.0)),
    "encoder and decoder cache in a dict": lambda: {"cache": EncoderDecoderCache(filled_cache(), filled_cache())},
}  # fmt: skip

batches = pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)


def rows_of(tensor):
    return tensor if where(tensor) is None else tensor[ROW]


@batches
def test_narrowed_rows_are_views_in_a_value_of_the_same_form(batch):
    whole = batch()
    seen = narrow(whole, where)
    assert type(seen) is type(whole)
    assert [key for key, _ in items(seen)] == [key for key, _ in items(whole)]
    pairs = list(zip(tensors(seen), tensors(whole), strict=True))
    assert pairs
    for part, all_rows in pairs:
        assert torch.equal(part, rows_of(all_rows))
        assert part is all_rows if where(all_rows) is None else part._base is not None
        assert part.untyped_storage().data_ptr() == all_rows.untyped_storage().data_ptr()


@batches
def test_a_change_in_place_of_the_rows_is_one_of_the_whole_and_of_no_other_row(batch):
    whole, before = batch(), [each.clone() for each in tensors(batch())]
    for part, all_rows in zip(tensors(narrow(whole, where)), tensors(whole), strict=True):
        if where(all_rows) is not None:
            part.mul_(-2)
    for now, then in zip(tensors(whole), before, strict=True):
        if where(then) is not None:
            then[1] *= -2
        assert torch.equal(now, then)


@batches
def test_rows_spliced_in_replace_those_and_no_others(batch):
    whole, before = batch(), [each.clone() for each in tensors(batch())]
    holders = [id(each) for each in tensors(whole)]

    seen = narrow(whole, where)
    shared = {id(each) for each in tensors(whole) if where(each) is None}
    part = mapped(seen, lambda each: each if id(each) in shared else each * 2 - 1)
    spliced = splice(whole, part, where)
    assert type(spliced) is type(whole)
    for number, (now, then) in enumerate(zip(tensors(spliced), before, strict=True)):
        if where(then) is None:
            assert id(now) == holders[number]
        else:
            then[1] = then[1] * 2 - 1
        assert torch.equal(now, then)


def mapped(value, change):
    """`value` with every tensor changed, in containers of their own."""
    if isinstance(value, torch.Tensor):
        return change(value)
    inside = {key: mapped(item, change) for key, item in items(value)}
    if isinstance(value, Pair):
        return Pair(**dict(zip(Pair._fields, inside.values(), strict=True)))
    if isinstance(value, (tuple, list)):
        return type(value)(inside.values())
    if isinstance(value, dict):
        return type(value)(inside)
    if isinstance(value, Held):
        return Held(**inside)
    if inside:
        value = copy.copy(value)
        vars(value).update(inside)
    return value


@batches
def test_what_was_narrowed_and_is_given_back_unchanged_or_changed_in_place_leaves_the_whole_as_it_is(batch):
    whole = batch()
    before = list(tensors(whole))
    seen = narrow(whole, where)
    for part, all_rows in zip(tensors(seen), before, strict=True):
        if where(all_rows) is not None:
            part.add_(1)
    spliced = splice(whole, seen, where)
    assert all(one is other for one, other in zip(tensors(spliced), before, strict=True))


def test_narrowing_a_cache_leaves_the_cache_and_splicing_keeps_it_the_same_object():
    cache = filled_cache()
    keys = cache.layers[0].keys.clone()
    seen = narrow(cache, where)
    assert seen is not cache
    assert seen.layers[0] is not cache.layers[0]
    assert torch.equal(cache.layers[0].keys, keys)
    assert seen.get_seq_length() == cache.get_seq_length() == 4
    layer = cache.layers[0]
    seen.layers[0].keys = seen.layers[0].keys * 0
    assert splice(cache, seen, where) is cache
    assert cache.layers[0] is layer
    keys[1] = 0
    assert torch.equal(layer.keys, keys)


@pytest.mark.parametrize(
    ("whole", "part", "said"),
    [
        (numbered(3, 2), numbered(2, 2), "[2, 2] float32 in the place of [1, 2] float32"),
        (numbered(3, 2), numbered(1, 3), "[1, 3] float32 in the place of [1, 2] float32"),
        (numbered(3, 2), None, "NoneType in the place of a tensor [3, 2] float32"),
        (numbered(1, 2), numbered(1, 2), "a new value for [1, 2] float32, which all invokes share"),
        ((numbered(3), numbered(1)), (numbered(1), numbered(1)), "a new value for [1] float32, which all invokes share"),
        ((numbered(3), 5), (numbered(1), 6), "int in the place of int, which all invokes share"),
        ((numbered(3), None), (numbered(1), numbered(1)), "[1] float32 in the place of NoneType, which all invokes share"),
        ((numbered(3),), (numbered(1), 2), "([1] float32, int) in the place of ([3] float32)"),
        ((numbered(3),), [numbered(1)], "[[1] float32] in the place of ([3] float32)"),
        ({"a": numbered(3)}, {"b": numbered(1)}, "dict in the place of dict"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_rows_or_changes_what_is_shared_is_refused(whole, part, said):
    before = [each.clone() for each in tensors(whole)]
    with pytest.raises(ValueError) as caught:
        splice(whole, part, where)
    assert str(caught.value) == said
    assert all(map(torch.equal, tensors(whole), before))


def test_rows_are_put_in_with_the_dtype_of_the_whole():
    spliced = splice(numbered(3, 2), torch.ones(1, 2, dtype=torch.float64), where)
    assert spliced.dtype == torch.float32
    assert spliced[1].tolist() == [1, 1]


class Reversed(torch.autograd.Function):
    """The same values in the same memory, and the gradient with its sign turned."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        (lambda rows: rows, 1),
        (lambda rows: rows.mul_(3), 3),
        (lambda rows: rows.detach(), 0),
        (lambda rows: rows.detach().requires_grad_(), 0),
        (Reversed.apply, -1),
        (lambda rows: Reversed.apply(rows.mul_(2)), -2),
        (lambda rows: rows * 5, 5),
    ],
    ids=["as they are", "in place", "detached", "a leaf", "of a function", "in place and of a function", "new"],
)
def test_the_gradient_of_spliced_rows_is_that_of_what_was_given(change, factor):
    leaf = numbered(3, 2).requires_grad_()
    whole = leaf * 1
    part = change(narrow(whole, where))
    spliced = splice(whole, part, where)
    spliced.sum().backward()
    assert leaf.grad.tolist() == [[1, 1], [factor, factor], [1, 1]]
    if part.is_leaf and part.requires_grad:
        assert part.grad.tolist() == [[1, 1]]


def test_a_leaf_in_the_memory_of_rows_without_gradient_gets_its_gradient():
    whole = numbered(3, 2)
    part = narrow(whole, where).requires_grad_()
    (splice(whole, part, where) * 2).sum().backward()
    assert part.grad.tolist() == [[2, 2]]


def test_a_cache_of_a_models_own_class_is_one():
    from transformers.models.reformer.modeling_reformer import ReformerDynamicCache

    past = ReformerDynamicCache()
    past.states_cache.append(numbered(3, 2))
    assert [each.shape for each in tensors(narrow(past, lambda _: slice(1, 2)))] == [(1, 2)]
    kept = copied(past, torch.clone)
    past.states_cache.append(numbered(3, 4))
    assert [each.shape for each in tensors(kept)] == [(3, 2)]
