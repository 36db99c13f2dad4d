"""Tensors inside whatever a module returns."""

import collections
import dataclasses

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from nnsight_eager import shapes
from nnsight_eager.nested import first_tensor, tensors, with_first_tensor

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
