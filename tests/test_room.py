"""What has come from another process gets memory of this one, large or small."""

import mmap

import pytest
import torch

from nnsight_eager.remote.room import HUGE, copy_of


@pytest.mark.parametrize("size", [12, HUGE - 4, HUGE, 3 * HUGE + 4])
@pytest.mark.parametrize("advice", ["taken", "refused", "unknown"])
def test_what_can_only_be_read_is_copied_to_what_can_be_written(size, advice, monkeypatch):
    if advice == "unknown":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    if advice == "refused":
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1, raising=False)
    source = torch.arange(size // 4, dtype=torch.int32)
    copy = torch.frombuffer(copy_of(memoryview(source.numpy()).toreadonly()), dtype=torch.int32)
    assert copy.equal(source)
    copy += 1
    assert source.equal(torch.arange(size // 4, dtype=torch.int32))
    assert copy.equal(source + 1)
