"""What client and server say to each other is the same on the other side, as bytes where it can be."""

from importlib.util import find_spec

import numpy
import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install '.[ray]'")


def answered(value, error=None):
    """An answer as it comes out on the other side, and as what it was sent."""
    from remote_in_process import travelled

    from nnsight_eager.remote.wire import Answer, At, answer_meant, answer_sent

    at = At(("model.layers.1", "", ()), "input", 1, False, 2, True, False)
    sent = travelled(answer_sent(Answer(at, value, error)))
    answer = answer_meant(sent)
    assert answer.at == at
    return answer, sent


@pytest.mark.parametrize("size", [4, 40_000])
def test_a_tensor_is_within_the_bytes_of_an_answer_unless_it_is_large(size):
    from nnsight_eager.remote.packing import packed, unpacked

    answer, sent = answered(packed(torch.arange(size)))
    assert isinstance(sent, bytes) == (size == 4)
    assert unpacked(answer.value).equal(torch.arange(size))


def test_arguments_are_what_they_were():
    from nnsight_eager.remote.packing import packed, unpacked
    from nnsight_eager.remote.wire import Arguments

    first = torch.randn(2, 3)
    answer, sent = answered(
        Arguments(packed(first), [None, (1, ((2, 3), "float32")), (2, "DynamicCache")], 2, ["a", "b"], True)
    )
    assert isinstance(sent, bytes)
    assert unpacked(answer.value.first).equal(first)
    assert answer.value[1:] == ([None, (1, ((2, 3), "float32")), (2, "DynamicCache")], 2, ["a", "b"], True)


def test_what_no_bytes_can_hold_is_left_to_ray():
    answer, sent = answered(torch.float16, ValueError("what was raised"))
    assert not isinstance(sent, bytes)
    assert answer.value is torch.float16
    assert str(answer.error) == "what was raised"


@pytest.mark.parametrize(
    ("argument", "as_bytes"), [("layer", True), (lambda visit: visit.step == 3, False)], ids=["text", "function"]
)
def test_a_message_is_bytes_unless_it_has_what_is_the_users_own(argument, as_bytes):
    from types import SimpleNamespace

    from remote_in_process import travelled

    from nnsight_eager.remote.wire import Message, message_meant, message_sent

    before = [("listen", (("model.layers.1", "source", ()),))]
    sent = travelled(message_sent(7, Message(3, None, before, None, "by_hand", ("until", argument))))
    assert isinstance(sent, bytes) is as_bytes
    session, message = message_meant(sent)
    assert (session, message[:5]) == (7, (3, None, before, None, "by_hand"))
    assert message.args[0] == "until"
    assert message.args[1] == argument if as_bytes else message.args[1](SimpleNamespace(step=3))


@pytest.mark.parametrize("value", [numpy.int64(3), numpy.float32(0.5), numpy.arange(3), bytearray(b"abc")], ids=repr)
def test_numbers_and_arrays_of_numpy_arrive_as_what_they_are(value):
    answer, _ = answered([1, value])
    assert type(answer.value[1]) is type(value)
    assert numpy.array_equal(answer.value[1], value)
