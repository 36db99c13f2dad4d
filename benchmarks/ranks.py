"""What does reading a point cost where several ranks run one model? Microseconds beside the bare collective.

python benchmarks/ranks.py [--ranks N] [--rounds N]

A Llama of 4 layers, 256 wide, is divided by transformers' plan among ranks that talk over gloo on loopback. Baselines are the
divided model itself, called bare, and one `all_gather` of a tensor of the size that a read puts together. Each way is timed
in every round, in the same order on all ranks, which have to run together; medians of rank 0.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import torch
import transformers

from nnsight_eager import LanguageModel

WIDTH, LAYERS = 256, 4


def saved(folder: str) -> None:
    """A random model in a folder."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=4096,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def main(folder: str, rounds: int) -> None:
    """What each rank runs."""
    torch.set_num_threads(1)
    model = LanguageModel(folder, tp_plan="auto", dispatch=True)
    ranks = torch.distributed.get_world_size()

    def bare(ids: torch.Tensor) -> None:
        model._module(ids)

    def empty(ids: torch.Tensor) -> None:
        with model.trace(ids):
            pass

    def whole_already(ids: torch.Tensor) -> None:
        with model.trace(ids):
            for layer in model.model.layers:
                _ = layer.output

    def put_together(ids: torch.Tensor) -> None:
        with model.trace(ids):
            for layer in model.model.layers:
                _ = layer.mlp.act_fn.output

    def local(ids: torch.Tensor) -> None:
        with model.trace(ids):
            for layer in model.model.layers:
                _ = layer.mlp.act_fn.local.output

    def replaced(ids: torch.Tensor) -> None:
        with model.trace(ids):
            for layer in model.model.layers:
                layer.mlp.act_fn.output = layer.mlp.act_fn.output * 2

    def gathers(ids: torch.Tensor) -> None:
        own = torch.empty(ids.shape[1] * 4 * WIDTH // ranks)
        heard = [torch.empty_like(own) for _ in range(ranks)]
        for _ in range(LAYERS):
            torch.distributed.all_gather(heard, own)

    ways: list[Callable[[torch.Tensor], None]] = [bare, empty, whole_already, local, put_together, replaced, gathers]
    with torch.no_grad():
        for tokens in (16, 256):
            ids = torch.arange(tokens)[None] % 512
            times: dict[str, list[float]] = {way.__name__: [] for way in ways}
            for number in range(rounds + 3):
                for way in ways:
                    torch.distributed.barrier()
                    start = time.perf_counter()
                    way(ids)
                    if number >= 3:
                        times[way.__name__].append(time.perf_counter() - start)
            if torch.distributed.get_rank() == 0:
                report(tokens, {name: 1e6 * statistics.median(each) for name, each in times.items()})
    torch.distributed.destroy_process_group()


COLUMNS = (
    "tokens", "put together", "the divided model, bare", "an empty trace adds", "a point that is whole",
    "this rank's part, `.local`", "a shard, put together", "and replaced", "one bare `all_gather`",
)  # fmt: skip


def report(tokens: int, taken: dict[str, float]) -> None:
    """A row of the table: one input's times."""
    empty = taken["empty"]
    each = [(taken[name] - empty) / LAYERS for name in ("whole_already", "local", "put_together", "replaced")]
    times = [taken["bare"], empty - taken["bare"], *each, taken["gathers"] / LAYERS]
    print(f"| {tokens} | {tokens * 4 * WIDTH * 4 // 1024} kB | {' | '.join(f'{time:,.0f} µs' for time in times)} |", flush=True)


def launch(ranks: int, rounds: int) -> None:
    """Run this file as so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        saved(folder)
        print(f"torch {torch.__version__}, transformers {transformers.__version__}, {ranks} ranks, gloo, 1 thread a rank\n")
        print(f"| {' | '.join(COLUMNS)} |\n|{'---:|' * len(COLUMNS)}", flush=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
        subprocess.run([*command, __file__, "--folder", folder, "--rounds", str(rounds)], env=environment, check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--folder")
    given = parser.parse_args()
    main(given.folder, given.rounds) if given.folder else launch(given.ranks, given.rounds)
