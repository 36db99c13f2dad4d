"""What a model on a server costs: a read by the size of its tensor, runs a second by clients, functions, memory by run.

    python benchmarks/remote.py

A cluster of this machine is started, on the loopback. A read gives a tensor in this process's own memory, which may be changed
in place. It is timed beside bare Ray calls of the same payload that give the same: of an actor that returns the tensor, as
anybody would write it, and of one that returns its bytes as an array, copied here since Ray's memory can only be read. The
array alone, not copied and with its bytes not looked at, is the least Ray can do. The read is of a layer's input where the
model is paused at the output of the layer before: nothing is computed in between. Runs are of a small model, two reads each,
from processes of their own. Functions are of the model that is read, with 33 tokens each.
"""

import argparse
import contextlib
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import torch
from report import installed

import nnsight_eager
from nnsight_eager.remote.cluster import CALLS_AT_ONCE, ray_module

WIDTH = 1024
TOKENS = (1, 16, 256, 4096)
CLIENTS = (1, 2, 4, 8)
TOGETHER = (1, 8, 32)
SECONDS = 4.0


def saved_model(folder: Path, **sizes: int) -> str:
    """A Llama of random weights, which takes token ids."""
    import transformers

    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, bos_token_id=0, eos_token_id=0, max_position_embeddings=8192, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@contextlib.contextmanager
def serving(folder: str, name: str, address: str | None = None) -> Iterator[str]:
    """Serve a model with the command of the README; the cluster's address."""
    where = ["--address", address] if address else ["--cluster-cpus", "8", "--store-mb", "400"]
    command = [sys.executable, "-m", "nnsight_eager", "serve", folder, "--name", name, *where]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        found = re.search(r'address="(.*?)"', server.stdout.readline())
        assert found is not None
        yield found[1]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


class Bare:
    """An actor that gives away a tensor, and does nothing else."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.tensors = {tokens: torch.randn(1, tokens, WIDTH) for tokens in sizes}

    def tensor(self, tokens: int) -> torch.Tensor:
        return self.tensors[tokens]

    def array(self, tokens: int) -> Any:
        return self.tensors[tokens].numpy()

    def nothing(self) -> None:
        pass


def timed(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def reads(address: str, rounds: int) -> None:
    """The table of reads by size."""
    model = nnsight_eager.connect("wide", address)
    ray = ray_module()
    bare = ray.remote(Bare).options(max_concurrency=CALLS_AT_ONCE).remote(TOKENS)
    print("| tensor | bare call, array | copied | bare call, tensor | a read | of the array | of the copied | of the tensor |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for tokens in TOKENS:
        calls = {
            "array": lambda tokens=tokens: ray.get(bare.array.remote(tokens)),
            "copied": lambda tokens=tokens: torch.from_numpy(ray.get(bare.array.remote(tokens)).copy()),
            "tensor": lambda tokens=tokens: ray.get(bare.tensor.remote(tokens)),
        }
        times: dict[str, list[float]] = {name: [] for name in (*calls, "read")}
        ids = [[1] * tokens]
        for round in range(rounds + 3):
            with torch.no_grad(), model.trace(ids) as tracer:
                model.model.layers[0].output
                taken = {"read": timed(lambda: model.model.layers[1].input)}
                tracer.stop()
            for name in sorted(calls, key=lambda _: random.random()):
                before = calls[name]()  # the read too has one of its kind before it, and what that gave is kept
                taken[name] = timed(calls[name])
                del before
            if round >= 3:
                for name, each in taken.items():
                    times[name].append(each * 1e6)
        medians = {name: statistics.median(each) for name, each in times.items()}
        read = medians["read"]
        size = tokens * WIDTH * 4
        shown = f"{size // 1024} kB" if size < 2**20 else f"{size // 2**20} MB"
        columns = [f"{each:,.0f} µs" for each in medians.values()] + [f"{read / medians[name]:.2f}" for name in calls]
        print(f"| {shown} | {' | '.join(columns)} |", flush=True)
    model.disconnect()
    ray.kill(bare)


def client(address: str) -> None:
    """One client in a process of its own: how many runs, then how many bare calls, it makes in a while."""
    model = nnsight_eager.connect("small", address)
    ray = ray_module()
    bare = ray.get_actor("bare", namespace="nnsight_eager")

    def run() -> None:
        with model.trace([[1, 2, 3, 4, 5, 6, 7, 8]]):
            model.model.layers[1].output *= 2
            model.lm_head.output

    def calls() -> None:
        for _ in range(3):
            ray.get(bare.nothing.remote())

    for work in (run, calls):
        work()
        print("ready", flush=True)
        sys.stdin.readline()
        count, until = 0, time.monotonic() + SECONDS
        while time.monotonic() < until:
            work()
            count += 1
        print(count, flush=True)
    sys.stdin.readline()
    model.disconnect()


def runs(address: str) -> None:
    """The table of runs a second by clients."""
    ray = ray_module()
    bare = ray.remote(Bare).options(max_concurrency=CALLS_AT_ONCE, name="bare", namespace="nnsight_eager").remote(())
    ray.get(bare.nothing.remote())
    model = nnsight_eager.connect("small", address)
    print("| clients | runs a second | three bare calls, a second | wait for a turn, median | longest |")
    print("|---:|---:|---:|---:|---:|")
    for count in CLIENTS:
        command = [sys.executable, __file__, "--client", address]
        clients = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)]
        try:
            rates, waits = [], []
            for _ in ("runs", "bare calls"):
                for each in clients:
                    assert each.stdout.readline() == "ready\n"
                for each in clients:
                    print(file=each.stdin, flush=True)
                rates.append(sum(int(each.stdout.readline()) for each in clients) / SECONDS)
                waits = waits or [each for each in model.status()["clients"] if each["turns"]]
            median = statistics.median(each["median wait"] for each in waits) * 1e3
            longest = max(each["longest wait"] for each in waits) * 1e3
            print(f"| {count} | {rates[0]:,.0f} | {rates[1]:,.0f} | {median:.2f} ms | {longest:.0f} ms |")
            for each in clients:
                print(file=each.stdin, flush=True)
                each.wait(60)
        finally:
            for each in clients:
                each.kill()
    model.disconnect()
    ray.kill(bare)


def block(model: Any) -> torch.Tensor:
    """A submitted function that is the block of a trace."""
    model.model.layers[1].output *= 2
    return model.lm_head.output[:, -1]  # type: ignore[no-any-return]


def opening(model: Any, ids: list[list[int]]) -> torch.Tensor:
    """The same with a trace of its own."""
    with torch.no_grad(), model.trace(ids):
        return block(model)


def came_of(futures: Iterable[Any]) -> list[Any]:
    """What all of them give, submitted before the first is waited for."""
    return [future.result() for future in [*futures]]


def functions(address: str) -> None:
    """The table of submitted functions, which share passes or do not."""
    model = nnsight_eager.connect("wide", address)
    print("| submitted together | with a trace each, a second | as the block of a trace, a second |")
    print("|---:|---:|---:|")
    for count in TOGETHER:
        inputs = [[[number, *range(TOGETHER[-1])]] for number in range(count)]
        times: dict[str, list[float]] = {"opening": [], "block": []}
        for _ in range(10):
            times["opening"].append(timed(lambda inputs=inputs: came_of(model.submit(opening, ids) for ids in inputs)))
            times["block"].append(timed(lambda inputs=inputs: came_of(model.trace(ids).submit(block) for ids in inputs)))
        rates = [count / statistics.median(each) for each in times.values()]
        print(f"| {count} | {rates[0]:,.0f} | {rates[1]:,.0f} |")
    model.disconnect()


def memory(address: str) -> None:
    """The table of what a paused run holds, beside the formula of the README."""
    model = nnsight_eager.connect("wide", address)
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    key_values = 2 * model.config.num_key_value_heads * model.config.head_dim
    print("| tokens | paused behind layer | held | by the formula |")
    print("|---:|---:|---:|---:|")
    for tokens in (256, 1024):
        for layer in (1, layers - 1):
            with model.trace([[1] * tokens]) as tracer:
                model.model.layers[layer].output_ref
                (held,) = [each for client in model.status()["clients"] for each in client["runs"].values()]
                tracer.stop()
            formula = 4 * tokens * (3 * width + 2 * model.config.head_dim + (layer + 1) * key_values)
            print(f"| {tokens} | {layer} | {held['bytes'] / 1e6:.2f} MB | {formula / 1e6:.2f} MB |")
    model.disconnect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="reads of each size (default: 100)")
    parser.add_argument("--only-reads", action="store_true", help="the first table alone")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        client(options.client)
        return
    narrow = {"intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    with tempfile.TemporaryDirectory() as folder:
        wide_model = saved_model(Path(folder) / "wide", hidden_size=WIDTH, num_hidden_layers=4, **narrow)
        small_model = saved_model(Path(folder) / "small", **small)
        with serving(wide_model, "wide") as address, serving(small_model, "small", address):
            print(", ".join(map(installed, ("torch", "transformers", "ray"))), end="\n\n", flush=True)
            reads(address, options.rounds)
            for table in () if options.only_reads else (runs, functions, memory):
                print()
                table(address)
            ray_module().shutdown()


if __name__ == "__main__":
    main()
