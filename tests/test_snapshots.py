"""What a tensor held is kept without a copy, and is what it was whoever writes afterwards."""

import pytest
import torch

from nnsight_eager import NNsight
from nnsight_eager.snapshots import settle, snapshot

WRITES = {
    "the tensor": lambda tensor, kept: tensor.mul_(3),
    "a view of it": lambda tensor, kept: tensor[1:].zero_(),
    "an array of it": lambda tensor, kept: tensor.numpy().fill(7),
    "by an index": lambda tensor, kept: tensor.__setitem__((0, 1), 5),
    "without a record": lambda tensor, kept: tensor.data.add_(1),
    "the copy": lambda tensor, kept: kept.mul_(3),
    "a view of the copy": lambda tensor, kept: kept.view(-1)[2:].zero_(),
    "an array of the copy": lambda tensor, kept: kept.numpy().fill(7),
}


def is_lazy(tensor):
    return torch._C._is_cow_tensor(tensor)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("under", ["nothing", "inference mode"])
def test_one_is_written_and_the_other_is_as_it_was(write, under):
    with torch.inference_mode(under == "inference mode"):
        tensor = torch.randn(3, 4)
        before = tensor.tolist()
        kept, further = snapshot(tensor), snapshot(tensor)
        assert is_lazy(kept)
        write(tensor, kept)
        assert (tensor.tolist() == before) is not (kept.tolist() == before)
        assert further.tolist() == before


def test_a_view_that_was_made_before_is_of_the_tensor():
    tensor = torch.zeros(3)
    view, kept = tensor[1:], snapshot(tensor)
    view += 1
    assert tensor.tolist() == [0, 1, 1]
    assert kept.tolist() == [0, 0, 0]


def test_the_model_reads_without_a_copy():
    tensor = torch.randn(2, 3)
    kept = snapshot(tensor)
    torch.nn.functional.gelu(torch.nn.Linear(3, 3)(tensor)) + tensor
    assert is_lazy(tensor)
    assert is_lazy(kept)


def test_a_part_does_not_keep_the_whole():
    kept = snapshot(torch.randn(100, 4)[:2])
    assert kept.untyped_storage().nbytes() == kept.nbytes


def test_a_parameter_stays_where_it_is():
    weight = torch.nn.Parameter(torch.randn(3))
    kept = snapshot(weight)
    assert not is_lazy(weight)
    with torch.no_grad():
        weight += 1
    assert not torch.equal(kept, weight)


def test_gradients_go_through():
    leaf = torch.randn(3, dtype=torch.double, requires_grad=True)
    kept = snapshot(leaf * 2)
    assert is_lazy(kept)
    assert torch.autograd.grad(kept.sum(), leaf)[0].tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.from_numpy(torch.randn(3).numpy().copy()),
        torch.randn(1, 3).expand(2, 3),
        torch.randn(3, 2).t(),
        torch.empty(0, 3),
        torch.randn(3, dtype=torch.cfloat).conj(),
        torch.empty(3, device="meta"),
    ],
    ids=["sparse", "memory of numpy's", "expanded", "transposed", "empty", "conjugate", "meta"],
)
def test_whatever_the_tensor_is_the_copy_is_as_of_clone(tensor):
    kept, clone = snapshot(tensor), tensor.clone()
    assert (kept.layout, kept.device, kept.dtype, kept.shape) == (clone.layout, clone.device, clone.dtype, clone.shape)
    if kept.layout == torch.strided:
        assert kept.stride() == clone.stride()
    if not kept.is_meta:
        assert torch.equal(kept.to_dense(), tensor.to_dense())


def test_an_empty_buffer_can_be_filled_afterwards():
    buffer = torch.empty(0)
    kept = snapshot(buffer)
    torch.add(torch.ones(3), 1, out=buffer)
    assert buffer.tolist() == [2, 2, 2]
    assert not len(kept)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.*deprecated:UserWarning")
def test_a_quantized_tensor_keeps_its_scale():
    tensor = torch.quantize_per_tensor(torch.ones(3), 0.25, 0, torch.qint8)
    kept = snapshot(tensor)
    assert not is_lazy(kept)
    assert torch.equal(kept, tensor)
    assert kept.q_scale() == 0.25


def test_under_vmap():
    assert torch.vmap(lambda row: snapshot(row).add_(1))(torch.zeros(2, 3)).tolist() == [[1] * 3] * 2


@pytest.mark.parametrize("alone", [True, False])
def test_a_settled_copy_has_memory_of_its_own(alone):
    tensor = torch.randn(3)
    before, kept = tensor.tolist(), snapshot(tensor)
    if alone:
        del tensor
    settle(kept)
    assert not is_lazy(kept)
    assert kept.tolist() == before


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(3).to_sparse(), torch.empty(3, device="meta"), torch.randn(3).requires_grad_()],
    ids=["sparse", "meta", "leaf"],
)
def test_what_is_no_lazy_copy_is_settled(tensor):
    settle(tensor)


def test_what_a_cache_hands_out_is_settled():
    model = NNsight(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Identity(), torch.nn.ReLU(inplace=True)))
    cache = model.cache(torch.ones(2, 3), include_inputs=True)
    assert any(is_lazy(each.output) for entries in cache._entries.values() for each in entries)
    for path in cache:
        assert not is_lazy(cache[path].output)
        assert not is_lazy(cache[path].input)
    assert torch.equal(cache["0"].output, cache["1"].output)
    assert cache["0"].output.data_ptr() != cache["1"].output.data_ptr()
