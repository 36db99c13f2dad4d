"""What a function can be called with: as `inspect` tells, which is slow."""

import functools
import inspect
import itertools

import pytest
import torch

from nnsight_eager.signatures import keywords_of, takes


class Methods:
    def one(self, a):
        """A positional one."""

    def optional(self, a, b=1, *, c=2):
        """Some have a default."""

    def named(self, *, a, b=1):
        """By keyword only."""

    def before(self, a, /, b=1):
        """By position only."""

    def any_keywords(self, a, **others):
        """Further keywords."""

    def any_arguments(self, *args):
        """Further positions."""

    def no_name_for_what_it_is_bound_to(*args, a):
        """By keyword only."""

    def none(self):
        """Nothing."""

    @functools.wraps(optional)
    def wrapped(self, *args, **kwargs):
        """It shows what it wraps."""

    @classmethod
    def of_the_class(cls, a=1):
        """Bound to its class."""

    @staticmethod
    def alone(a, b=1):
        """Bound to nothing."""


NAMES = [name for name in vars(Methods) if not name.startswith("_")]
GIVEN = [dict.fromkeys(names, 0) for count in range(4) for names in itertools.combinations("abcd", count)]


def binds(function, given):
    try:
        inspect.signature(function).bind(**given)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("owner", [Methods(), Methods], ids=["of an object", "of the class"])
def test_a_function_takes_what_its_signature_says(owner, name):
    function = getattr(owner, name)
    assert [takes(function, given) for given in GIVEN] == [binds(function, given) for given in GIVEN]


@pytest.mark.parametrize("name", NAMES)
def test_the_keywords_of_a_method_are_those_of_its_signature(name):
    function = getattr(Methods(), name)
    for _ in range(2):  # the second time it is known
        assert keywords_of(function) == inspect.signature(function).parameters.keys()


def test_what_has_no_signature_is_left_to_the_call():
    with pytest.raises(ValueError, match="no signature"):
        inspect.signature(torch.add)
    assert takes(torch.add, {"anything": 1})


def test_an_object_and_a_partial_function_are_called_as_they_say():
    assert takes(functools.partial(Methods().one, 1))
    assert not takes(functools.partial(Methods().one))
    assert takes(torch.nn.Linear(1, 1).forward, {"input": 1})
    assert not takes(torch.nn.Linear(1, 1).forward)
