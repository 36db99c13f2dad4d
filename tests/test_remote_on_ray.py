"""A model on a Ray cluster of this machine, on the loopback: the README's session, deaths, and many clients at once."""

import contextlib
import filecmp
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from on_ray import below, serving
from small_models import FOLDER
from test_readme import README

import nnsight_eager
from nnsight_eager import LanguageModel, ServerLostError

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install '.[ray]'"),
    # Ray's own, in the process that connects: a socket that it leaves to be collected.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

PROMPT = "The Eiffel Tower is in the city of"
SILENCE = 3.0
PATIENCE = 120
SESSION = re.findall(r"^```py\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    """The address of a cluster that serves `gpt2`, and the process of the command."""
    with serving(folder("gpt2"), "gpt2", tmp_path_factory.mktemp("server"), "--silence-limit", str(SILENCE)) as served:
        yield served


@pytest.fixture(scope="module")
def address(served):
    return served[0]


@pytest.fixture(scope="module")
def local(folder):
    return LanguageModel(folder("gpt2"), dispatch=True)


@pytest.fixture
def remote(address):
    model = nnsight_eager.connect("gpt2", address)
    yield model
    model.disconnect()


def edited(model, factor=0.5, layer=1):
    with model.trace(PROMPT):
        model.transformer.h[layer].output = model.transformer.h[layer].output * factor
        return model.lm_head.output


def plain(local, *arguments):
    with torch.no_grad():
        return edited(local, *arguments)


@pytest.mark.parametrize("block", SESSION, ids=range(len(SESSION)))
def test_the_session_of_the_readme(block, address, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = block.replace('"10.0.0.1:6379"', f'"{address}"')
    assert script != block
    names = {"__name__": "__main__"}
    exec(compile(script, "README.md", "exec"), names)
    names["model"].disconnect()


def test_a_process_that_has_imported_ray_already_connects_too(address):
    script = f"import ray, nnsight_eager; model = nnsight_eager.connect('gpt2', {address!r}); print(model.transformer.wte)"
    environment = {**os.environ, "PYTHONPATH": str(FOLDER)}
    for name in ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert not done.returncode, done.stderr
    assert "Embedding" in done.stdout


def test_a_trace_an_edit_steps_a_function_and_a_cache(remote, local):
    assert edited(remote).equal(plain(local))
    run = remote.trace(PROMPT).start()
    run.step().to(remote.transformer.h[1])
    remote.transformer.h[1].output *= 0.5
    assert run.finish().logits.equal(plain(local))
    assert remote.submit(lambda model, factor: edited(model, factor).detach(), 0.5).result(60).equal(plain(local))
    there, here = (model.cache(PROMPT, modules="transformer.h.*", positions=-1) for model in (remote, local))
    assert all(there[path].output.equal(here[path].output) for path in here)


def test_a_function_says_how_far_it_has_come_and_can_be_cancelled(remote):
    def count(model):
        number = 0
        while True:
            number += 1
            nnsight_eager.report(number, 10**9, "traces")
            model.trace("Paris").result

    future = remote.submit(count)
    until = time.monotonic() + PATIENCE
    while not future.progress.done and time.monotonic() < until:
        time.sleep(0.05)
    assert future.progress.total == 10**9
    assert not future.done()
    with pytest.raises(TimeoutError):
        future.result(timeout=0.01)
    assert edited(remote).shape[0] == 1  # others take turns with it
    future.cancel()
    with pytest.raises(nnsight_eager.RunEndedError, match="cancelled"):
        future.result(60)


def test_two_workers_write_the_same_files_as_one_process(remote, local, tmp_path):
    texts = [PROMPT + " of" * number for number in range(24)]
    options = {"batch_tokens": 100, "shard_bytes": 12_000}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        local.extract(texts, ["transformer.h.*"], tmp_path / "alone", **options)
        shutil.copytree(tmp_path / "alone", tmp_path / "shared")
        for shard in [*(tmp_path / "shared").glob("shard-*")][1:]:  # what an extraction has left that was killed
            shard.unlink()
        local.extract(texts, ["transformer.h.*"], tmp_path / "shared", workers=2, **options)
    finally:
        torch.set_num_threads(before)
    names = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert len(names) > 5
    assert filecmp.cmpfiles(tmp_path / "alone", tmp_path / "shared", names, shallow=False) == (names, [], [])


def killing(process):
    """A thread that kills the process that `process` gives, as soon as it gives one; and what it has killed."""
    killed = []

    def kill():
        until = time.monotonic() + PATIENCE
        while not killed and time.monotonic() < until:
            if (found := process()) is not None:
                os.kill(found, signal.SIGKILL)
                killed.append(found)
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread, killed


@pytest.mark.parametrize("where", ["a worker", "the server"])
def test_an_extraction_whose_process_is_killed_in_the_middle_is_the_same_to_the_bit(where, remote, local, served, tmp_path):
    def at_work():
        """A worker that makes a shard, while others have been made."""
        if [*(tmp_path / "killed").glob("shard-*.safetensors")] and [*(tmp_path / "killed").glob("shard-*.part")]:
            for each in below(served[1]):
                with contextlib.suppress(OSError):
                    if b"ray::Worker.make" in Path(f"/proc/{each}/cmdline").read_bytes():
                        return each
        return None

    def serving():
        return remote.status()["pid"] if len([*(tmp_path / "killed").glob("shard-*.safetensors")]) > 1 else None

    texts = [PROMPT + " of" * number for number in range(24)]
    options = {"batch_tokens": 100, "shard_bytes": 12_000}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    thread, killed = killing(at_work if where == "a worker" else serving)
    try:
        here, there = (model.edit(lambda: time.sleep(0.1)) for model in (local, remote))
        if where == "a worker":
            here.extract(texts, ["transformer.h.*"], tmp_path / "killed", workers=2, **options)
        else:
            there.extract(texts, ["transformer.h.*"], tmp_path / "killed", retries=1, **options)
        here.extract(texts, ["transformer.h.*"], tmp_path / "alone", **options)
    finally:
        torch.set_num_threads(before)
        thread.join()
    assert killed
    names = sorted(path.name for path in (tmp_path / "alone").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert filecmp.cmpfiles(tmp_path / "alone", tmp_path / "killed", names, shallow=False) == (names, [], [])


def test_a_client_that_is_killed_has_its_runs_closed(remote, address):
    script = f"""
import sys, nnsight_eager
model = nnsight_eager.connect("gpt2", {address!r})
with model.trace({PROMPT!r}):
    model.transformer.h[1].output
    print("paused", flush=True)
    sys.stdin.read()
"""
    client = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(FOLDER)},
    )

    def paused():
        return [run["at"] for each in remote.status()["clients"] for run in each["runs"].values()]

    try:
        assert client.stdout.readline().strip() == "paused"
        assert paused() == ["<forward of GPT2LMHeadModel: paused at model.transformer.h[1].output, step 0>"]
        time.sleep(SILENCE)  # alive and silent in its block, it gives signs of life
        assert len(paused()) == 1
        client.kill()
        client.wait(30)
        killed = time.monotonic()
        while paused() and time.monotonic() < killed + PATIENCE:
            time.sleep(0.05)
        assert not paused()
        assert not any(each["owner"].endswith(f":{client.pid}") for each in remote.status()["clients"])
    finally:
        client.kill()
        client.wait(30)
        client.stdin.close()
        client.stdout.close()


def test_many_clients_at_once_get_what_each_asked_for(address, local, capsys):
    count, traces = 8, 50
    expected = {(client, layer): plain(local, 1 + client / 10, layer) for client in range(count) for layer in range(3)}
    models = [nnsight_eager.connect("gpt2", address) for _ in range(count)]
    wrong = []

    def work(client):
        for number in range(traces):
            got = edited(models[client], 1 + client / 10, number % 3)
            if not got.equal(expected[client, number % 3]):
                wrong.append((client, number))

    try:
        threads = [threading.Thread(target=work, args=(client,)) for client in range(count)]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        took = time.perf_counter() - begun
        assert not any(thread.is_alive() for thread in threads)
        clients = models[0].status()["clients"]
    finally:
        for model in models:
            model.disconnect()
    assert not wrong
    busy = [each for each in clients if each["turns"]]
    assert [each["turns"] for each in busy] == [3 * traces] * count  # two reads and the end
    with capsys.disabled():
        print(f"\n{count} clients x {traces} traces in {took:.1f} s; waited for a turn (median, longest):", end=" ")
        print(", ".join(f"{each['median wait'] * 1e3:.2f} and {each['longest wait'] * 1e3:.1f} ms" for each in busy))


def wait_for(model, begun, go):
    """A function that runs until a file is there; in which process it has."""
    begun.touch()
    while not go.exists():
        time.sleep(0.01)
    return os.getpid(), edited(model).detach()


def test_a_server_that_is_killed_is_an_error_that_names_the_run_or_what_was_asked_is_repeated(remote, local, tmp_path):
    other = nnsight_eager.connect("gpt2")
    begun, go = tmp_path / "begun", tmp_path / "go"
    try:
        repeated, lost = (remote.submit(wait_for, begun, go, retries=retries) for retries in (1, 0))
        until = time.monotonic() + PATIENCE
        while not begun.exists() and time.monotonic() < until:
            time.sleep(0.01)
        first = remote.status()["pid"]
        with remote.trace(PROMPT, retries=1), pytest.raises(ServerLostError) as caught, other.trace(PROMPT):
            hidden = remote.transformer.h[1].output
            remote.transformer.h[1].output = hidden * 0.25
            remote.transformer.h[1].output *= 2
            other.transformer.h[0].output
            os.kill(remote.status()["pid"], signal.SIGKILL)
            logits = remote.lm_head.output
            other.transformer.h[1].output
        assert logits.equal(plain(local))
        message = str(caught.value)
        assert message.startswith(
            "The actor `gpt2` has died, and with it run 1 (`forward`), paused at `model.transformer.h[0].output`. Ray says: "
        )
        assert "`model.trace(..., retries=1)`" in message
        assert caught.traceback[-1].path == Path(__file__)
        assert edited(other).equal(plain(local))  # it is known again, without being asked to connect
        go.touch()
        process, logits = repeated.result(PATIENCE)
        assert process == remote.status()["pid"] != first
        assert logits.equal(plain(local))
        with pytest.raises(ServerLostError, match="the function that was submitted"):
            lost.result(PATIENCE)
    finally:
        other.disconnect()


def test_a_model_or_a_cluster_that_is_not_there_is_a_sentence(address):
    with pytest.raises(nnsight_eager.RemoteError) as caught:
        nnsight_eager.connect("llama", address)
    assert str(caught.value).startswith("The cluster serves no model called `llama`; it serves `gpt2`.")
