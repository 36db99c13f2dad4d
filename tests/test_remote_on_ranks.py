"""A model that two ranks on a Ray cluster hold together is used from here as one in this process."""

import contextlib
import os
import signal
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from on_ray import below, serving

import nnsight_eager
from nnsight_eager import LanguageModel, RunEndedError, ServerLostError

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install '.[ray]'"),
    # Ray's own, in the process that connects: a socket that it leaves to be collected.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

IDS = [[1, 2, 3, 4]]
PATIENCE = 120


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small Llama that two ranks can divide, though not evenly."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=66, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder := tmp_path_factory.mktemp("divided"))
    return folder


@pytest.fixture(scope="module")
def served(saved, tmp_path_factory):
    """The address, and the process of the command."""
    os.environ["NNSIGHT_EAGER_RANKS_TIMEOUT"] = "4"
    try:
        with serving(saved, "llama", tmp_path_factory.mktemp("server"), "--tp", "2") as address_and_process:
            yield address_and_process
        assert not meeting_places(address_and_process[1])
    finally:
        del os.environ["NNSIGHT_EAGER_RANKS_TIMEOUT"]


def meeting_places(process):
    """The folders in which the ranks of a command meet."""
    return [*Path(tempfile.gettempdir()).glob(f"nnsight_eager-{process}-*")]


@pytest.fixture
def remote(served):
    model = nnsight_eager.connect("llama", served[0])
    yield model
    model.disconnect()


@pytest.fixture(scope="module")
def local(saved):
    return LanguageModel(saved, dispatch=True)


def edited(model, factor=0.5):
    with torch.no_grad(), model.trace(IDS):
        active = model.model.layers[0].mlp.act_fn.output
        model.model.layers[0].mlp.act_fn.output = active * (active > 0)
        hidden = model.model.layers[1].output.clone()
        model.model.layers[1].output[:] = hidden * factor
        return [active, hidden, model.lm_head.output]


def heads(model):
    with torch.no_grad(), model.trace(IDS):
        query = model.model.layers[1].self_attn.q_proj.output
        pattern = model.model.layers[1].self_attn.pattern
        return [pattern, query, model.lm_head.output]


def generated(model):
    chosen = []
    with model.generate(IDS, max_new_tokens=3, do_sample=False) as tracer:
        for _ in tracer.iter[:]:
            model.model.layers[0].mlp.act_fn.output *= 0.5
            chosen.append(model.lm_head.output[0, -1])
    return [*chosen, tracer.result]


def by_hand(model):
    with torch.no_grad():
        run = model.trace(IDS).start()
        run.step().to(model.model.layers[0].mlp.act_fn)
        model.model.layers[0].mlp.act_fn.output *= 2
        other = run.fork()
        run.back_to(model.model.layers[0].input_layernorm)
        return [run.finish().logits, other.finish().logits]


def cached(model):
    cache = model.cache(IDS, modules="model.layers.*.mlp.act_fn", positions=-1)
    return [cache[path].output for path in cache]


def block(model):
    active = model.model.layers[0].mlp.act_fn.output
    model.model.layers[0].mlp.act_fn.output = active * 2
    return [active, model.lm_head.output]


def gradients(model):
    with model.trace(IDS) as tracer:
        active = model.model.layers[0].mlp.act_fn.output
        with tracer.backward(model.lm_head.output[0, -1].logsumexp(-1)):
            gradient = model.model.layers[0].mlp.act_fn.output_grad
    return [active.detach(), gradient]


def same(there, here):
    assert len(there) == len(here) > 0
    for one, other in zip(there, here, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("program", [edited, heads, generated, by_hand, cached], ids=lambda program: program.__name__)
def test_a_program_gives_what_it_gives_in_one_process(program, remote, local):
    same(program(remote), program(local))


def test_the_ranks_meet_in_a_folder_that_is_gone_with_the_command(served):  # which the fixture looks for in the end
    assert [file.name.startswith("ranks-") for folder in meeting_places(served[1]) for file in folder.iterdir()] == [True]


def test_a_function_runs_on_every_rank_with_gradients_and_as_the_block_of_a_trace(remote, local):
    with torch.no_grad(), local.trace(IDS):
        expected = block(local)
    futures = [remote.trace(IDS).submit(block) for _ in range(4)]
    for future in futures:
        same(future.result(PATIENCE), expected)
    same(remote.submit(gradients).result(PATIENCE), gradients(local))


def test_a_handle_and_a_module_are_of_the_whole(remote, local):
    with torch.no_grad(), local.trace(IDS):
        active = local.model.layers[1].mlp.act_fn.output
    with remote.trace(IDS):
        handle = remote.model.layers[1].mlp.act_fn.output_ref
    assert handle.shape == active.shape
    same([handle[:, -1].get(), handle.norm()], [active[:, -1], active.norm()])


def test_an_extraction_is_computed_by_all_ranks(remote, local, tmp_path):
    texts, points = [[1, 2, 3], [4, 5], [6, 7, 8, 9]], ["model.layers.*", "model.layers.0.mlp.act_fn"]
    there, here = (model.extract(texts, points, tmp_path / name) for name, model in (("there", remote), ("here", local)))
    assert there.points == here.points
    for one, other in zip(there, here, strict=True):
        same([one[path] for path in here.points], [other[path] for path in here.points])


def test_several_clients_and_their_functions_take_turns(served, local):
    models = [nnsight_eager.connect("llama", served[0]) for _ in range(3)]
    expected = edited(local)
    got = []

    def work(model):
        got.extend(edited(model) for _ in range(5))

    def several(model):
        return [edited(model) for _ in range(5)][-1]

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    futures = [model.submit(several) for model in models]
    for thread in threads:
        thread.join(PATIENCE)
    got += [future.result(PATIENCE) for future in futures]
    assert len(got) == 18
    for each in got:
        same(each, expected)
    for model in models:
        model.disconnect()


def test_a_function_that_is_cancelled_ends_on_every_rank(remote, local):
    def endless(model):
        number = 0
        while True:
            number += 1
            edited(model)
            nnsight_eager.report(number, 10**9, "traces")

    future = remote.submit(endless)
    until = time.monotonic() + PATIENCE
    while not future.progress.done and time.monotonic() < until:
        time.sleep(0.05)
    same(edited(remote), edited(local))  # it takes turns with others
    future.cancel()
    with pytest.raises(RunEndedError, match="cancelled"):
        future.result(PATIENCE)
    same(edited(remote), edited(local))


def other_ranks(process):
    """The processes of the ranks other than 0."""
    found = []
    for each in below(process):
        with contextlib.suppress(OSError):
            if b"OtherRank" in Path(f"/proc/{each}/cmdline").read_bytes():
                found.append(each)
    return found


def test_a_rank_that_is_killed_is_an_error_at_the_line_that_asks_or_the_run_is_repeated(served, remote, local):
    other = nnsight_eager.connect("llama")
    (rank,) = other_ranks(served[1])
    try:
        with remote.trace(IDS, retries=1), pytest.raises(ServerLostError) as caught, other.trace(IDS):
            active = remote.model.layers[0].mlp.act_fn.output
            remote.model.layers[0].mlp.act_fn.output = active * 2
            other.model.layers[0].mlp.act_fn.output
            os.kill(rank, signal.SIGKILL)
            logits = remote.lm_head.output
            other.lm_head.output
        with torch.no_grad(), local.trace(IDS):
            same([active, logits], block(local))
        assert caught.traceback[-1].path == Path(__file__)
        message = str(caught.value)
        assert message.startswith("The actor `llama` has died, and with it run 1 (`forward`), paused at `model.model.layers[0]")
        assert len(other_ranks(served[1])) == 1
        same(edited(other), edited(local))
    finally:
        other.disconnect()


def test_ranks_that_have_lost_each_other_are_made_anew(remote, local):
    def differing(model):
        return None if torch.distributed.get_rank() else edited(model)

    with pytest.raises(ServerLostError, match="the function that was submitted"):
        remote.submit(differing).result(PATIENCE)
    with torch.no_grad(), remote.trace(IDS, retries=1), local.trace(IDS):
        same(block(remote), block(local))
