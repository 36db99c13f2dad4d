"""A model that several ranks run together is read and edited as in one process; each test is a check of `on_ranks`."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from on_ranks import CHECKS, checks_for
from small_models import FOLDER

HERE = Path(__file__).parent
SIZES = {
    "llama": {"attention_bias": True, "intermediate_size": 66},  # which four ranks cannot divide evenly
    "gemma3_text": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]},
    "gpt2": {},
}
COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    """A folder of tiny saved models, all of which four ranks can divide."""
    import transformers

    root = tmp_path_factory.mktemp("divided")
    for kind, sizes in SIZES.items():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, vocab_size=len(tokenizer), **{**COMMON, **sizes})
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
    return root


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def launched(size, folder, *arguments, limit, **environment):
    """Run Python as so many ranks; of each its exit code, `None` where it had to be ended, and what it printed."""
    port = free_port()
    common = {
        **os.environ,
        "PYTHONPATH": str(FOLDER),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        **environment,
    }
    outputs = [(folder / f"rank-{size}-{rank}.txt").open("w+") for rank in range(size)]
    ranks = []
    try:
        for rank, output in enumerate(outputs):
            own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen([sys.executable, *map(str, arguments)], env=own, stdout=output, stderr=output))
        with contextlib.suppress(subprocess.TimeoutExpired):
            ranks[0].wait(limit)
            for each in ranks[1:]:
                each.wait(20)
        codes = [each.poll() for each in ranks]
    finally:
        for each in ranks:
            each.kill()
            each.wait()
        for output in outputs:
            output.close()
    return [(code, Path(output.name).read_text()) for code, output in zip(codes, outputs, strict=True)]


def results(size, folder):
    """What each rank says of each check."""
    ranks = launched(size, folder, HERE / "on_ranks.py", folder, limit=240)
    files = [folder / f"results-{size}-{rank}.json" for rank in range(size)]
    assert all(file.exists() for file in files), ranks
    every = [json.loads(file.read_text()) for file in files]
    return {name: [each.get(name, "it was not run") for each in every] for name in CHECKS}


@pytest.fixture(scope="module")
def two_ranks(models):
    return results(2, models)


@pytest.fixture(scope="module")
def four_ranks(models):
    return results(4, models)


@pytest.mark.parametrize("name", checks_for(2))
def test_on_two_ranks(name, two_ranks):
    assert two_ranks[name] == [""] * 2, max(two_ranks[name], key=len)


@pytest.mark.parametrize("name", checks_for(4))
def test_on_four_ranks(name, four_ranks):
    assert four_ranks[name] == [""] * 4, max(four_ranks[name], key=len)


LEFT_ALONE = """
import os, signal, sys, time
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from nnsight_eager import NNsight

mesh = init_device_mesh("cpu", (2,))
module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
model = NNsight(parallelize_module(module, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()}))
with model.trace(torch.ones(1, 4)):
    model[0].output
    if os.environ["RANK"] == "1":
        WHAT
    model[1].output
    print("both were there")
"""


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "Rank 0 asks for `model[1].output` in step 0, and another rank has not said"),
        ("time.sleep(200)", "Rank 0 asks for `model[1].output` in step 0, and another rank has not said within 3 seconds"),
        ("model[2].output", "rank 0 asks for `model[1].output` in step 0; rank 1 asks for `model[2].output` in step 0."),
    ],
    ids=["it is killed", "it does something else", "it asks for another point"],
)
def test_a_rank_whose_other_does_not_ask_ends_with_a_sentence(what, sentence, tmp_path):
    script = tmp_path / "left_alone.py"
    script.write_text(LEFT_ALONE.replace("WHAT", what))
    (code, said), *_ = launched(2, tmp_path, script, limit=120, NNSIGHT_EAGER_RANKS_TIMEOUT="3")
    # It has ended by itself, long before what the other does; torch may abort a process that ends while it is connected.
    assert code in (1, -signal.SIGABRT), said
    assert sentence in " ".join(said.split("\n"))
    assert "both were there" not in said


def test_the_script_of_the_readme_runs_under_torchrun(models, tmp_path):
    readme = (FOLDER / "README.md").read_text()
    block = next(each for each in re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S) if "tp_plan" in each)
    script = tmp_path / "script.py"
    end = "torch.distributed.barrier()\ntorch.distributed.destroy_process_group()\n"  # as the text below asks
    script.write_text(block.replace("meta-llama/Llama-3.1-8B", str(models / "llama")) + end)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
        script,
    ]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    aborted = "terminate called without an active exception" in done.stderr  # by torch, as a process of the group ends
    assert done.returncode == 0 or aborted, done.stderr
    assert len(done.stdout.strip().splitlines()) == 1, done.stdout  # one rank prints
