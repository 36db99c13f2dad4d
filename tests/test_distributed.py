"""Two processes with gloo: DDP and FSDP2 models are read and edited, values and gradients as with plain hooks."""

import os
import subprocess
import sys

import pytest
import torch
from small_models import FOLDER

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")

SCRIPT = """
import os, sys, warnings
import torch
import torch.distributed as dist
warnings.simplefilter("ignore")  # torch's own, about what is new and what is slow on CPUs
from nnsight_eager import NNsight
sys.path.insert(0, "tests")
from small_models import Stack

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.set_num_threads(1)
x = torch.randn(3, 4, generator=torch.Generator().manual_seed(rank))
plain = Stack()

def by_hand():
    seen = []
    handle = plain.h[1].register_forward_hook(lambda m, a, output: seen.append(output) or output * 2)
    result = plain(x)
    handle.remove()
    return seen[0], result

def same(one, other):
    return torch.allclose(one, other, atol=1e-6)
"""

WRAPPED = {
    "DDP": """
from torch.nn.parallel import DistributedDataParallel
model = NNsight(DistributedDataParallel(Stack(), find_unused_parameters=True))
inner, weight = model.module, lambda: model._module.module.h[0].lin.weight.grad
""",
    "FSDP2": """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
module = Stack()
mesh = init_device_mesh("cpu", (2,))
for block in module.h:
    fully_shard(block, mesh=mesh)
fully_shard(module, mesh=mesh)
model = NNsight(module)
inner, weight = model, lambda: module.h[0].lin.weight.grad.full_tensor()
""",
}

BODY = """
for turn in range(2):
    want, result = by_hand()
    plain.zero_grad(), model._module.zero_grad()
    with model.trace(x) as tracer:
        lin = inner.h[1].lin.output
        seen = inner.h[1].output
        inner.h[1].output = seen * 2
        last = inner.head.output
    assert same(seen, want), (turn, seen, want)
    assert same(lin, want - plain.h[0](x)), turn
    assert same(tracer.result, result) and same(last, result), turn
    tracer.result.sum().backward()
    result.sum().backward()
    mean = plain.h[0].lin.weight.grad.clone()
    dist.all_reduce(mean)
    assert same(weight(), mean / 2), (turn, weight(), mean / 2)
    try:
        with model.trace(x):
            inner.h[0].output
            raise KeyError
    except KeyError:
        pass
    with model.trace(x) as tracer:
        cache = tracer.cache()
    assert same(tracer.result, plain(x))
print("right", flush=True)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("how", WRAPPED)
def test_a_model_on_two_processes(tmp_path, how):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + WRAPPED[how] + BODY)
    environment = {**os.environ, "PYTHONPATH": str(FOLDER), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")],
            env=environment,
            cwd=FOLDER,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    # Not the last line: torch now and then aborts a process of a group as it ends, also without this package.
    assert all("right" in text.splitlines() for text in said), "\n".join(said)
