"""A model on a server, used from here; without a cluster, over a line that pickles all that goes over it."""

import contextlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from left_behind import frames_on_other_stacks
from small_models import FOLDER

import nnsight_eager
from nnsight_eager import LanguageModel, NotReachedError, OutOfOrderError, RemoteError, RunEndedError, has_nan

HAS_RAY = find_spec("ray") is not None
pytestmark = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: pip install '.[ray]'")

PROMPT = "The Eiffel Tower is in the city of"
OTHER = "The Colosseum is in the city of"


@pytest.fixture(scope="module")
def server(folder):
    from remote_in_process import served

    return served(folder("gpt2"))


@pytest.fixture
def remote(server):
    from remote_in_process import client

    model = client(server)
    yield model
    model.disconnect()


@pytest.fixture(scope="module")
def local(folder):
    return LanguageModel(folder("gpt2"), dispatch=True)


def on_both(local, remote, program):
    """What a program gives on the model here, and on the one on the server."""
    with torch.no_grad():
        here = program(local)
    return here, program(remote)


def read(model):
    with model.trace(PROMPT) as tracer:
        values = [model.transformer.wte.output, model.transformer.h[1].attn.c_proj.input, model.transformer.h[1].hidden]
    return [*values, tracer.result.logits]


def read_at_the_output(model):
    with model.trace(PROMPT):
        output = model.transformer.h[1].output
        return [output, model.transformer.h[1].input, model.transformer.h[1].inputs[1]["position_ids"], model.lm_head.output]


def assign(model):
    with model.trace(PROMPT):
        model.transformer.h[0].output = model.transformer.h[0].output * 0.5
        model.transformer.h[1].input = model.transformer.h[1].input * 2
        model.transformer.h[2].mlp.inputs = ((model.transformer.h[2].mlp.input + 1,), {})
        return [model.lm_head.output]


def change_in_place(model):
    with model.trace(PROMPT):
        model.transformer.h[0].mlp.output[:, -1] = 0
        model.transformer.h[1].attn.c_proj.input *= 0.5
        model.transformer.h[1].attn.output[0][:, 0] = 3
        return [model.lm_head.output]


def skip(model):
    with model.trace(PROMPT):
        model.transformer.h[1].skip(model.transformer.h[1].input)
        return [model.lm_head.output]


def attention_pattern(model):
    with model.trace(PROMPT):
        pattern = model.transformer.h[1].attn.pattern.clone()
        model.transformer.h[1].attn.pattern[:, 0] = 0
        return [pattern, model.lm_head.output]


def operations(model):
    with model.trace(PROMPT):
        attention = model.transformer.h[1].attn.source.attention_interface_1
        query = attention.inputs[0][1].clone()
        attention.output[0][:, :, 1] = 0
        return [query, model.transformer.h[1].attn.source.self_c_proj_0.output, model.lm_head.output]


def generate(model):
    chosen = []
    with model.generate(PROMPT, max_new_tokens=4, do_sample=False) as tracer:
        for _ in tracer.iter[1:4:2]:
            model.transformer.h[1].mlp.output *= 0
            chosen.append(model.lm_head.output[0, -1])
    return [*chosen, tracer.result]


def next_tokens(model):
    with model.generate(PROMPT, max_new_tokens=3, do_sample=False) as tracer:
        first = model.transformer.h[0].output
        second = model.transformer.h[0].next()
        value = second.output.clone()
        second.output = value * 0
        tracer.next()
        return [first, value, model.transformer.h[0].output]


def side_by_side(model):
    with model.trace(PROMPT) as clean, model.trace(OTHER) as corrupt:
        corrupt.model.transformer.h[1].hidden[:, -1] = clean.model.transformer.h[1].hidden[:, -1]
        return [corrupt.model.lm_head.output]


def batch(model):
    with model.trace([PROMPT, "Paris"]):
        model.transformer.h[1].hidden[1] = 0
        return [model.lm_head.output]


def invokes_one_after_another(model):
    with model.trace(batched=False) as tracer:
        with tracer.invoke(PROMPT):
            one = model.transformer.h[1].hidden[:, -1]
        with tracer.invoke(OTHER):
            model.transformer.h[1].hidden[:, -1] = one
            return [one, model.lm_head.output]


def cache(model):
    with model.trace(PROMPT) as tracer:
        kept = tracer.cache(modules=["transformer.h.*.mlp", model.lm_head], positions=-1)
        model.transformer.h[0].mlp.output *= 2
    return [kept[path].output for path in kept]


def by_hand(model):
    run = model.trace(PROMPT).start()
    run.step().step().to(model.transformer.h[1].mlp)
    model.transformer.h[1].mlp.output[:, -1] = 0
    other = run.fork()
    other.model.transformer.h[1].mlp.output *= 2
    run.over()
    run.back_to(model.transformer.h[0])
    run.back_to(model.transformer.h[0].attn.source.self_c_proj_0)
    values = [model.transformer.h[0].output]
    run.until(has_nan)
    return [*values, run.result.logits, other.finish().logits]


def constants(model):
    torch.manual_seed(0)
    steered = model.steer(model.transformer.h[1], torch.randn(model.config.n_embd), scale=3, positions=-1)
    with steered, model.ablate(model.transformer.h[0].mlp, "mean"):
        return [model.trace(PROMPT).result.logits, model.generate(OTHER, max_new_tokens=3, do_sample=False).result]


def modules_applied(model):
    with model.trace(PROMPT):
        late = model.transformer.h[2].output
        return [model.lm_head(model.transformer.ln_f(late)), model.lm_head.output]


PROGRAMS = [
    read, read_at_the_output, assign, change_in_place, skip, attention_pattern, operations, generate, next_tokens, side_by_side,
    batch, invokes_one_after_another, cache, by_hand, constants, modules_applied,
]  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_program_gives_what_it_gives_on_a_model_here(program, local, remote):
    here, there = on_both(local, remote, program)
    assert len(here) == len(there) > 0
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0)


def test_the_tree_has_no_weights(remote, local):
    assert all(each.device.type == "meta" for each in remote._module.parameters())
    assert [name for name, _ in remote.named_modules()] == [name for name, _ in local.named_modules()]


def test_a_read_is_one_message_and_an_edit_none(remote):
    line = remote._tree.line
    with remote.trace(PROMPT):
        remote.transformer.h[0].output
        remote.transformer.h[0].output = remote.transformer.h[0].output * 2
        remote.transformer.h[1].output[:] = 0
        remote.transformer.h[1].output.sum()
    assert line.sent == ["ask", "ask", "finish"]


def test_what_a_tuple_has_beside_its_first_tensor_travels_only_where_it_is_read(remote):
    line = remote._tree.line
    with remote.trace(PROMPT):
        remote.transformer.h[0].attn.hidden = remote.transformer.h[0].attn.hidden * 2  # a tuple: the weights stay there
        assert line.sent == ["ask"]
        remote.output  # logits, and a key/value cache
    assert line.sent == ["ask", "ask", "rest", "finish"]


def test_of_the_arguments_only_the_one_that_is_asked_for_is_brought_and_the_others_are_what_they_are_there(remote, local):
    def wider(model):
        hidden = model.transformer.h[1].input
        args, named = model.transformer.h[1].inputs
        assert args[0] is model.transformer.h[1].input is hidden
        named["position_ids"].add_(1)
        hidden.mul_(2)
        return args, named

    with torch.no_grad(), local.trace(PROMPT):
        expected, names = wider(local)
        cache = expected[1].layers[0].keys
        positions = local.transformer.h[2].inputs[1]["position_ids"]  # the same tensor is given to every block
        logits = local.lm_head.output
    line = remote._tree.line
    line.sent.clear()
    with remote.trace(PROMPT) as tracer:
        remote.transformer.h[1].input
        assert line.sent == ["ask"]
        visit = tracer._run.at
        assert repr(visit.args[1]) == "<left on the server: DynamicCache>"
        assert repr(visit.kwargs["position_ids"]) == "<left on the server: [1, 14] int64>"
        args, named = wider(remote)
        assert line.sent == ["ask", "rest"]
        assert named.keys() == names.keys()
        assert args[1].layers[0].keys.equal(cache)
        assert remote.transformer.h[2].inputs[1]["position_ids"].equal(positions)
        assert remote.lm_head.output.equal(logits)


def test_a_tensor_that_is_in_two_places_of_a_visit_is_brought_once(remote, local):
    def given_back(model):
        output = model.transformer.drop.output
        assert model.transformer.drop.input is output
        output[:, 0] = 1
        return model.lm_head.output

    with torch.no_grad(), local.trace(PROMPT), remote.trace(PROMPT):
        assert given_back(remote).equal(given_back(local))


def test_a_value_that_was_read_can_be_changed_after_the_run_without_anybody_noticing(remote):
    with remote.trace(PROMPT):
        hidden = remote.transformer.h[0].output
        before = hidden.clone()
        logits = remote.lm_head.output
    hidden.zero_()
    with remote.trace(PROMPT):
        assert remote.transformer.h[0].output.equal(before)
        assert remote.lm_head.output.equal(logits)


def test_an_error_is_the_same_as_here_at_the_line_that_asked(local, remote):
    messages = []
    for model in (local, remote):
        with pytest.raises(OutOfOrderError) as caught, model.trace(PROMPT):
            model.transformer.h[2].output
            model.transformer.h[1].output
        messages.append((str(caught.value), caught.value.asked, caught.value.paused_at, caught.value.step))
        with pytest.raises(NotReachedError), model.trace(PROMPT):
            model.transformer.h[0].next().output
            model.transformer.h[0].next().output
    assert messages[0] == messages[1]
    assert caught.traceback[-1].path.name == "test_remote.py"


def test_a_bad_edit_is_named_with_its_line_here(remote):
    with pytest.raises(RuntimeError) as caught, remote.trace(PROMPT):
        remote.transformer.h[1].output = torch.zeros(1, 2, 3)
        remote.transformer.h[2].output
    notes = "\n".join(caught.value.__notes__)
    assert "The model was running `model.transformer.h[2].ln_1`." in notes
    assert "Edited before: `model.transformer.h[1].output` in step 0: [1, 14, 32] float32 became [1, 2, 3]" in notes
    assert __file__ in notes
    assert remote.status()["clients"][-1]["runs"] == {}


def test_leaving_a_block_by_an_error_closes_its_run_there(remote, server):
    with pytest.raises(ZeroDivisionError), remote.trace(PROMPT):
        remote.transformer.h[0].output
        (run,) = remote.status()["clients"][-1]["runs"].values()
        assert run["at"] == "<forward of GPT2LMHeadModel: paused at model.transformer.h[0].output, step 0>"
        1 / 0
    assert remote.status()["clients"][-1]["runs"] == {}
    assert not any("forward" in vars(module) for module in server._model._module.modules())


def test_what_is_looked_at_of_a_held_run_is_what_is_looked_at_here(local, remote):
    seen = []
    for model in (local, remote):
        with torch.no_grad():
            run = model.trace(PROMPT).start()
        run.to("transformer.h.1.mlp")
        model.transformer.h[1].mlp.output *= 2
        seen.append((repr(run.edits), repr(run).splitlines()[0], [*run.locals()], run.locals()["hidden_states"]))
        assert "paused at model.transformer.h[1].mlp.output (GPT2MLP), step 0" in repr(run.where())
        run.close()
    assert seen[0][:3] == seen[1][:3]
    assert seen[0][3].equal(seen[1][3])


def test_a_handle_is_looked_at_there_and_moves_when_it_is_wanted(local, remote):
    with torch.no_grad(), local.trace(PROMPT):
        value = local.transformer.h[1].output
        local.transformer.h[2].output = value
        patched = local.lm_head.output
    line = remote._tree.line
    with remote.trace(PROMPT):
        handle = remote.transformer.h[1].output_ref
        given = remote.transformer.h[2].input_ref
    assert (handle.shape, handle.dtype, given.shape) == (value.shape, value.dtype, value.shape)
    assert handle.norm().equal(value.norm())
    assert handle[:, -1].get().equal(value[:, -1])
    assert handle.apply(torch.mean, dim=1).get().equal(value.mean(dim=1))
    assert handle.get().equal(value)
    line.sent.clear()
    with remote.trace(PROMPT):
        remote.transformer.h[2].output = handle
        assert remote.lm_head.output.equal(patched)
    assert line.sent == ["ask", "ask", "finish"]


def test_a_function_runs_next_to_the_model_with_gradients_and_invokes(local, remote):
    def program(model, scale):
        with model.trace() as tracer:
            with tracer.invoke(PROMPT):
                hidden = remote.transformer.h[1].hidden  # the model from here is the one there
                loss = model.lm_head.output[0, -1].logsumexp(-1)
                with tracer.backward(loss):
                    gradient = model.transformer.h[1].output_grad
            with tracer.invoke(OTHER):
                logits = model.lm_head.output
        return gradient * scale, logits.detach(), hidden.detach()

    with local.trace(PROMPT) as tracer:
        hidden = local.transformer.h[1].hidden
        with tracer.backward(local.lm_head.output[0, -1].logsumexp(-1)):
            gradient = local.transformer.h[1].output_grad
    with torch.no_grad(), local.trace(OTHER):
        logits = local.lm_head.output
    future = remote.submit(program, 2)
    there = future.result()
    torch.testing.assert_close(there[0], gradient * 2)
    torch.testing.assert_close(there[1][:, -1], logits[:, -1])
    torch.testing.assert_close(there[2], hidden.detach())


def test_what_a_function_raises_is_raised_here_with_its_lines_there(remote):
    def divide(model):
        return 1 / 0

    with pytest.raises(ZeroDivisionError) as caught:
        remote.submit(divide).result()
    assert "in divide" in "\n".join(caught.value.__notes__)


def test_a_function_has_the_edits_made_here(local, remote):
    def ablate():
        remote.transformer.h[0].mlp.output *= 0

    def norm(model):
        return model.trace(PROMPT).result.logits.detach()

    with torch.no_grad():
        (expected,) = [local.edit(lambda: local.transformer.h[0].mlp.output.zero_()).trace(PROMPT).result.logits]
    assert remote.edit(ablate).submit(norm).result().equal(expected)


# Functions that share a forward pass


def last(model, layer, factor=1.0):
    model.transformer.h[0].mlp.output *= factor
    hidden = model.transformer.h[layer].output
    model.transformer.h[layer].output = hidden * 2
    return hidden[:, -1].clone(), model.lm_head.output, model.output.logits[0, -1].argmax()


def wait_until(true):
    until = time.monotonic() + 60
    while not true() and time.monotonic() < until:
        time.sleep(0.005)
    assert true()


def traced(model, ids, *args):
    with torch.no_grad(), model.trace(ids):
        return last(model, *args)


def wait_for(model, path):
    path.with_name("begun").touch()
    wait_until(path.exists)
    return model.lm_head.output.shape[0]


@pytest.fixture
def passes(server):
    """How many rows each forward pass of the server has had, in order."""
    seen = []
    before = server._model._module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    yield seen
    before.remove()


@contextlib.contextmanager
def all_waiting(server, first, count, path):
    """What is submitted in this block waits together, behind a function that waits for a file."""
    gate = first.trace([[0]]).submit(wait_for, path)
    wait_until(path.with_name("begun").exists)
    yield
    wait_until(lambda: len(server._functions._passes._waiting) == count)
    path.touch()
    assert gate.result(60) == 1


def test_functions_of_several_clients_share_a_pass_and_each_gets_what_it_gets_alone(server, local, passes, tmp_path):
    from remote_in_process import client

    clients = [client(server, f"client {number}") for number in range(3)]
    ids = [[[1, 2, 3, 4]], [[9, 8, 7, 6]], [[5, 5, 5, 5], [3, 1, 2, 4]], [[1, 2, 3]], [[3, 3, 1, 1]]]
    with all_waiting(server, clients[0], len(ids), tmp_path / "go"):
        futures = [clients[n % 3].trace(each).submit(last, n % 3, factor=n / 2) for n, each in enumerate(ids)]
    for number, (each, future) in enumerate(zip(ids, futures, strict=True)):
        expected = traced(local, each, number % 3, number / 2)
        for one, other in zip(future.result(60), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert sorted(passes) == [1, 1, 5]  # the one of another length is padded with nothing: it runs alone
    for each in clients:
        each.disconnect()


def loss(model):
    return model.output.loss


def test_a_loss_is_of_its_own_client_s_rows_alone(server, local, passes, tmp_path):
    from remote_in_process import client

    clients = [client(server, f"client {number}") for number in range(2)]
    ids = [torch.tensor([[1, 2, 3, 4]]), torch.tensor([[9, 8, 7, 6]])]
    with all_waiting(server, clients[0], 2, tmp_path / "go"):
        futures = [model.trace(each, labels=each).submit(loss) for model, each in zip(clients, ids, strict=True)]
    for each, future in zip(ids, futures, strict=True):
        torch.testing.assert_close(future.result(60), local._module(each, labels=each).loss.detach())
    assert passes == [1, 1, 1]
    for each in clients:
        each.disconnect()


def fail(model, how):
    hidden = model.transformer.h[1].output
    if how == "raises":
        raise ZeroDivisionError(how)
    if how == "breaks the forward pass":
        model.transformer.h[1].output = hidden[:, :2].repeat(1, 1, 3)
    if how == "changes what is shared":
        model.transformer.h[2].inputs[1]["position_ids"].zero_()
    return model.lm_head.output


@pytest.mark.parametrize("how", ["raises", "breaks the forward pass", "changes what is shared"])
def test_what_a_function_in_a_shared_pass_does_wrong_is_its_own_client_s(how, server, remote, local, passes, tmp_path):
    with all_waiting(server, remote, 3, tmp_path / "go"):
        good = [remote.trace([[number, 2, 3]]).submit(last, 1) for number in (1, 4)]
        bad = remote.trace([[7, 7, 7]]).submit(fail, how)
    for number, future in zip((1, 4), good, strict=True):
        torch.testing.assert_close(future.result(60)[1], traced(local, [[number, 2, 3]], 1)[1], rtol=1e-5, atol=1e-5)
    if how == "changes what is shared":  # alone, it shares it with nobody
        with torch.no_grad(), local.trace([[7, 7, 7]]):
            assert bad.result(60).equal(fail(local, how))
    else:
        with pytest.raises(ZeroDivisionError if how == "raises" else RuntimeError):
            bad.result(60)
    assert passes[1] == 3


def test_a_pass_has_only_as_many_rows_as_it_may_and_a_client_with_edits_has_its_own(folder, tmp_path):
    from remote_in_process import client, served

    server = served(folder("gpt2"), rows=2)
    remote = client(server)
    rows = []
    server._model._module.register_forward_pre_hook(
        lambda _, args, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    with all_waiting(server, remote, 4, tmp_path / "go"), remote.ablate(remote.transformer.h[0].mlp):
        edited = remote.trace([[1, 2]]).submit(last, 0)
        remote.clear_edits()
        plain = [remote.trace([[1, 2]]).submit(last, 0) for _ in range(3)]
    assert not any(edited.result(60)[1].equal(each.result(60)[1]) for each in plain)
    assert sorted(rows) == [1, 1, 1, 2]
    remote.disconnect()


def test_functions_in_a_shared_pass_open_traces_of_their_own_say_how_far_they_are_and_are_cancelled_one_by_one(
    server, remote, tmp_path
):
    def count(model, number):
        for layer in range(2):
            model.transformer.h[layer].output
            nnsight_eager.report(number + 1, 10, "things")
            if number == 1 and layer == 0:
                wait_until((tmp_path / "cancelled").exists)
        with model.trace([[1, 2, 3]]):  # a trace of its own within
            inner = model.transformer.h[1].output
        return number, inner.shape, model.transformer.h[2].output.shape

    with all_waiting(server, remote, 3, tmp_path / "go"):
        one, two, three = (remote.trace([[1, 2]] * (number + 1)).submit(count, number) for number in range(3))
    wait_until(lambda: two.progress.done)
    assert (one.progress, two.progress) == ((1, 10, "things"), (2, 10, "things"))
    two.cancel()
    (tmp_path / "cancelled").touch()
    assert one.result(60) == (0, torch.Size([1, 3, 32]), torch.Size([1, 2, 32]))
    assert three.result(60) == (2, torch.Size([1, 3, 32]), torch.Size([3, 2, 32]))
    with pytest.raises(RunEndedError, match="cancelled"):
        two.result(60)


def test_sampling_goes_by_the_seed_here(remote):
    def sampled(drawn):
        torch.manual_seed(3)
        with remote.generate(PROMPT, max_new_tokens=8, do_sample=True) as tracer:
            for _ in tracer.iter[:]:
                torch.rand(drawn)  # in the process of the server, which this is
        return tracer.result

    first = sampled(0)
    assert sampled(7).equal(first)
    assert not remote.generate(PROMPT, max_new_tokens=8, do_sample=True).result.equal(first)


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        (lambda model: model.trace().__enter__().invoke(PROMPT), "Put the trace into a function and `model.submit` it"),
        (lambda model: model.generate(PROMPT).submit(read), "Open generations, other methods and traces of invokes in"),
        (lambda model: model.edit(), "Write `model.edit(function)`."),
        (lambda model: model.trace(PROMPT, keep=True), "then `run.fork()`"),
        (lambda model: model.load_adapter("folder"), "Serve a folder that has it"),
        (lambda model: model.submit(lambda _: threading.Lock()).result(), "what stays next to the model goes into"),
    ],
)
def test_what_does_not_travel_is_refused_with_what_to_write_instead(refused, said, remote):
    with pytest.raises(RemoteError, match=said.split("`")[0]) as caught:
        refused(remote)
    assert said in str(caught.value)


def test_gradients_do_not_travel(remote, server):
    with pytest.raises(RemoteError, match="Gradients do not travel"), remote.trace(PROMPT) as tracer:
        remote.transformer.h[1].output
        with tracer.backward(remote.lm_head.output.sum()):
            pass
    with remote.trace(PROMPT):
        assert not remote.lm_head.output.requires_grad
        (seat,) = [seat for seat in server._sessions.all()[-1].seats.values() if not seat.ended]
        assert not seat.run.run.at.value.requires_grad  # no graph is held for nobody


def test_extraction_writes_where_the_model_is_and_reads_through_it(remote, local, tmp_path):
    texts = [PROMPT, "Paris", OTHER]
    there = remote.extract(texts, ["transformer.h.*"], tmp_path / "there")
    here = local.extract(texts, ["transformer.h.*"], tmp_path / "here")
    far = remote.activations(tmp_path / "there")
    assert far.lengths == here.lengths
    for one, two, three in zip(here, there, far, strict=True):
        assert one.tokens.equal(two.tokens)
        assert one.tokens.equal(three.tokens)
        for path in here.points:
            assert one[path].equal(two[path])
            assert one[path].equal(three[path])


# Clients and their limits


def test_a_run_that_nobody_touches_is_closed_and_says_so(folder):
    from remote_in_process import client, served

    model = client(served(folder("gpt2"), idle=0.4))
    with pytest.raises(RunEndedError) as caught, model.trace(PROMPT):
        model.transformer.h[0].output
        until = time.monotonic() + 20
        while model._tree.line.server._sessions.all()[0].seats and time.monotonic() < until:
            time.sleep(0.05)
        model.transformer.h[1].output
    assert str(caught.value).startswith("Run 1 was closed: nobody had touched it for 0.4 seconds.")


def test_a_client_that_is_silent_loses_its_runs_and_handles(folder):
    from remote_in_process import client, served

    server = served(folder("gpt2"), silence=3)
    silent, alive = client(server, "silent"), client(server, "alive")
    with alive.trace(PROMPT):
        kept = alive.transformer.h[0].output
        run = silent.trace(PROMPT).start()
        run.step()
        until = time.monotonic() + 20
        while len(server._sessions.all()) > 1 and time.monotonic() < until:
            assert server.beat(alive._tree.line._opened.session, [])
            time.sleep(0.05)
        (client_alive,) = server.status()["clients"]
        assert client_alive["owner"] == "alive"
        assert alive.transformer.h[1].output.shape == kept.shape
    run._run.open = False  # there is nobody to close it


def test_a_run_whose_client_goes_while_it_waits_for_its_first_turn_is_not_kept(folder):
    from remote_in_process import client, served

    server = served(folder("gpt2"))
    remote = client(server)
    session = server._sessions[remote._tree.line.session.session]
    beginning = threading.Thread(target=lambda: remote.trace(PROMPT).start())
    with server._turns.of("another"):
        beginning.start()
        wait_until(lambda: any(waiting for waiting, _ in server._turns.owners().values()))
        server.leave(session.number)
    beginning.join(60)
    wait_until(lambda: not session.seats and session.queued not in server._turns.owners())
    assert session.ended == {1: "was closed: its client has given no sign of life"}
    assert not [name for name in frames_on_other_stacks() if "forward" in name]


def test_a_client_that_holds_more_than_it_may_loses_the_run_that_was_too_much(folder):
    from remote_in_process import client, served

    model = client(served(folder("gpt2"), memory=60_000))
    with model.trace("Paris"):
        assert model.transformer.h[1].output is not None
        (run,) = model.status()["clients"][0]["runs"].values()
        assert 0 < run["bytes"] < 60_000
    with pytest.raises(RunEndedError) as caught, model.trace([PROMPT] * 40):
        model.transformer.h[1].output
    assert "more than its limit of 0.1 MB" in str(caught.value)
    with model.trace("Paris"):
        handles = [model.transformer.h[0].output_ref]
    with pytest.raises(RemoteError, match="handles of this client hold") as caught:
        for _ in range(400):
            with model.trace("Paris"):
                handles.append(model.transformer.h[0].output_ref)
    del handles


def test_a_paused_run_holds_its_residual_stream_however_deep_it_is_and_its_key_value_cache(folder):
    from nnsight_eager.remote.holding import held_bytes, weights_of

    model = LanguageModel(folder("gpt2"), dispatch=True)
    weights = weights_of(model._module)

    def held(layer, use_cache):
        with torch.no_grad(), model.trace(PROMPT, use_cache=use_cache) as tracer:
            hidden = model.transformer.h[layer].output
            return hidden.nbytes, held_bytes(tracer._run, weights)

    width, first = held(0, use_cache=False)
    assert 2 * width <= first <= 5 * width  # what the block was given and gives, and the embeddings that it is the sum of
    assert held(1, use_cache=False)[1] == held(2, use_cache=False)[1]
    key_values = [held(layer, use_cache=True)[1] - held(layer, use_cache=False)[1] for layer in range(3)]
    assert key_values == [2 * width * (layer + 1) for layer in range(3)]


def test_clients_take_turns_and_who_has_computed_least_is_next():
    from nnsight_eager.remote.turns import Turns

    turns, order, ready = Turns(), [], []

    def work(owner, seconds):
        ready.append(owner)
        with turns.of(owner):
            order.append(owner)
            time.sleep(seconds)

    threads = [threading.Thread(target=work, args=each) for each in [("greedy", 0.05)] * 4 + [("modest", 0.01)] * 3]
    with turns.of("first"):
        for number, thread in enumerate(threads):
            thread.start()
            while sum(waiting for waiting, _ in turns.owners().values()) <= number:
                time.sleep(0.001)
    for thread in threads:
        thread.join(30)
    assert order[0] == "greedy"  # both have had nothing, and it asked first
    assert order[1:4] == ["modest", "modest", "modest"]
    assert len(turns.waits("greedy")) == 4
    assert turns.waits("modest")[0] >= 0.05


def test_a_rank_takes_the_turns_that_it_is_told_of_in_their_order_and_none_of_a_call_that_has_ended():
    from nnsight_eager.remote.ranks import Follower

    ranks, order = Follower(), []

    def work(call, times):
        with ranks.following(call):
            for number in range(times):
                with ranks.turns.of(f"client {call}"):
                    order.append((call, number))

    def work_too_long():
        with pytest.raises(RunEndedError, match="On rank 0 this call has ended"):
            work(3, 2)

    threads = [threading.Thread(target=work, args=(call, 2)) for call in (1, 2)] + [threading.Thread(target=work_too_long)]
    for thread in threads:
        thread.start()
    for number, call in {2: 1, 3: 3, 1: 2, 5: 4, 6: 1, 4: 2}.items():  # they may arrive in any order
        ranks.turns.turn_is_of(number, call)
    ranks.turns.left(4)  # it has ended here already
    ranks.turns.call_has_ended(3, 6)
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert order == [(2, 0), (1, 0), (3, 0), (2, 1), (1, 1)]


class OtherRankHere:
    """The actor of another rank, whose methods are called on threads of this process."""

    def __init__(self, server):
        self.server, self.threads = server, ThreadPoolExecutor(32)

    def __getattr__(self, name):
        from nnsight_eager.remote.together import OtherRank

        method = partial(getattr(OtherRank, name), self.server)
        return SimpleNamespace(remote=lambda *args: self.threads.submit(method, *args))


@pytest.mark.parametrize("goes", ["is cancelled", "has a client that leaves"])
def test_what_nobody_waits_for_any_more_is_left_out_of_a_pass_on_every_rank(goes, folder, local, monkeypatch):
    from remote_in_process import client

    from nnsight_eager.remote import functions
    from nnsight_eager.remote.ranks import First, Follower
    from nnsight_eager.remote.serving import Server
    from nnsight_eager.remote.sessions import Limits

    limits, ran = Limits(silence=1e6), {"here": [], "there": []}
    there = Server(str(folder("gpt2")), "tiny", {}, limits, Follower())
    first = First([OtherRankHere(there)], lambda doing: [each.result(60) for each in doing], lambda: None)
    server = Server(str(folder("gpt2")), "tiny", {}, limits, first)
    together = functions.run_together

    def noting(model, blocks):
        together(model, blocks)
        where = "here" if model._module is server._model._module else "there"
        ran[where].append([(each.owner, each.error) for each in blocks])

    monkeypatch.setattr(functions, "run_together", noting)
    stays, leaves = client(server, "stays"), client(server, "leaves")
    waiting = server._functions._passes
    with waiting._one_at_a_time:
        one = stays.trace([[1, 2, 3]]).submit(last, 1)
        other = leaves.trace([[4, 5, 6]]).submit(last, 1)
        wait_until(lambda: len(waiting._waiting) == 2)
        if goes == "is cancelled":
            other.cancel()
        else:
            server.leave(leaves._tree.line.session.session)
    torch.testing.assert_close(one.result(60)[1], traced(local, [[1, 2, 3]], 1)[1], rtol=1e-5, atol=1e-5)
    with pytest.raises(RunEndedError, match="cancelled" if goes == "is cancelled" else "no sign of life"):
        other.result(60)
    assert ran["here"] == ran["there"] == [[("stays#1", None)]]
    for each in (stays, leaves):
        each.disconnect()


def test_a_turn_within_a_turn_is_the_same_one():
    from nnsight_eager.remote.turns import Turns

    turns = Turns()
    with turns.of("one"), turns.of("one"):
        assert len(turns.waits("one")) == 1
    with turns.of("two"):
        assert len(turns.waits("two")) == 1


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6).reshape(2, 3),
        torch.randn(3, 4).T,
        torch.randn(2, 3).bfloat16(),
        torch.tensor(1.5),
        torch.zeros(0, 3),
        torch.randn(2, dtype=torch.complex64).conj(),
        torch.tensor([True, False]),
    ],
    ids=lambda value: f"{list(value.shape)}-{value.dtype}",
)
def test_a_tensor_arrives_as_it_was_and_can_be_changed(value):
    from nnsight_eager.remote.packing import packed, unpacked

    arrived = unpacked(packed(value))
    assert arrived.dtype == value.dtype
    assert arrived.equal(value)
    nested = unpacked(packed({"a": (value, [value, 3])}))
    assert nested["a"][0] is nested["a"][1][0]
    before = value.clone()
    arrived.zero_()
    assert value.equal(before)


def test_importing_the_package_imports_no_ray_and_its_absence_is_a_sentence():
    code = """
import sys
import nnsight_eager
assert "ray" not in sys.modules
sys.modules["ray"] = None
for call in (
    lambda: nnsight_eager.connect("llama"),
    lambda: __import__("nnsight_eager.__main__").__main__.serve(["gpt2", "--name", "gpt2"]),
):
    try:
        call()
    except nnsight_eager.RemoteError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, timeout=120)
    expected = 'Models that run elsewhere need Ray, which is not installed.\nInstall it: `pip install "nnsight_eager[ray]"`.\n'
    assert done.stdout == expected * 2, done.stderr


def test_the_command_refuses_in_a_sentence(capsys):
    from nnsight_eager.__main__ import main

    assert main(["serve", "gpt2", "--name", "gpt2", "--tp", "2", "--device-map", "auto"]) == 1
    assert capsys.readouterr().err.startswith("nnsight_eager: `--tp 2` with `--device-map` cannot be served.")


def test_report_tells_nobody_outside_a_submitted_function():
    assert nnsight_eager.report(1, 2) is None


# What is looked at, ended and asked for in vain


def test_a_held_run_here_and_there_is_led_gone_back_in_and_looked_at_alike(local, remote):
    seen = []
    for model in (local, remote):
        with torch.no_grad(), model.trace(PROMPT).start() as run:
            run.to(model.transformer.h[1].mlp.act).out()
            said = [repr(run).splitlines()[0], run.paths(), repr(run.model.transformer.h[1])]
            model.transformer.h[1].mlp.output *= 0
            edited = run.finish().logits
            said += [repr(run).splitlines()[0]]
            run.restart()
            run.result = run.finish().logits * 2
            seen.append((said, edited, run.result))
        assert run.model is not None
    assert seen[0][0] == seen[1][0]
    assert "paused at model.transformer.h[1].mlp.output (GPT2MLP), step 0" in seen[1][0][0]
    assert "finished" in seen[1][0][-1]
    assert seen[0][1].equal(seen[1][1])
    assert seen[0][2].equal(seen[1][2])
    assert not seen[1][2].equal(2 * seen[1][1])


def test_what_is_shown_of_a_run_there_has_both_forms_and_runs_nothing(remote, server):
    run = remote.trace(PROMPT).start()
    run.to("transformer.h.0.mlp")
    where, names = run.where(), run.locals()
    assert "model.transformer.h[0].mlp.output" in repr(where)
    assert "hidden_states" in names._repr_html_()
    assert len(names) == len([*names])
    with pytest.raises(KeyError):
        names["nothing"]
    assert run._run.at.kind == "output"
    run.close()
    assert "closed" in repr(run)
    assert "h" in repr(run.model.transformer)  # the tree, with nothing known of it


def test_another_held_run_closes_the_first_and_says_so(remote):
    first = remote.trace(PROMPT).start()
    first.step()
    with pytest.warns(UserWarning, match=r"The run of this model that was held by hand has been closed: another was started\."):
        second = remote.trace(OTHER).start()
    assert not first._run.open
    assert second.step()._run.open
    second.close()


def test_a_result_is_replaced_there_whether_it_was_read_or_not(local, remote):
    with torch.no_grad():
        logits = local.trace(PROMPT).result.logits
    with remote.trace(PROMPT) as tracer:
        remote.transformer.h[0].output
        tracer.result = tracer.result.logits * 3
    assert tracer.result.equal(logits * 3)


def test_a_cache_is_written_where_the_model_is(remote, local, tmp_path):
    from safetensors.torch import load_file

    with remote.trace(PROMPT) as tracer:
        cache = tracer.cache(modules=["transformer.h.1"])
    cache.save_there(tmp_path / "there.safetensors")
    with torch.no_grad(), local.trace(PROMPT):
        expected = local.transformer.h[1].hidden
    assert any(each.equal(expected) for each in load_file(tmp_path / "there.safetensors").values())


def test_a_handle_says_what_it_is_of_and_is_let_go_with_its_client(remote, server):
    with remote.trace(PROMPT):
        handle = remote.transformer.h[1].output_ref
    assert repr(handle) == "<on tiny: [1, 14, 32] float32; `.get()` brings it>"
    assert len(handle) == 1
    session = server._sessions[remote._tree.line.session.session]
    assert "handles" in repr(session)
    assert server.beat(session.number, [handle.name, ("run", 1)])
    with pytest.raises(RemoteError) as caught:
        handle.get()
    assert str(caught.value).startswith("What this handle is of is not kept any more.")


def test_who_is_not_known_is_told_so_whatever_it_asks_for(folder):
    from remote_in_process import served

    from nnsight_eager.remote.packing import packed
    from nnsight_eager.remote.wire import Message, message_sent

    server = served(folder("gpt2"))
    session = server.open("somebody").session
    with server._turns.of(f"somebody#{session}"):
        pass
    assert [*server._turns.owners()] == [f"somebody#{session}"]
    server.leave(session)
    server.leave(session)
    assert not server._turns.owners()  # nothing is kept of whoever is gone
    assert server.beat(session, []) is False
    assert server.go(message_sent(session, Message(1, None, [], None, "nothing", ()))) is None
    assert server.run_function(session, 1, packed(None)) == ("unknown", None)
    assert server.handled(session, 1, "get", None) == ("unknown", None)
    assert server.call(session, "", packed(((), {}))) == ("unknown", None)
    assert server.progress(session, 1) == (0, 0, "")
    server.close(session, 1)


def test_a_function_can_be_cancelled_and_says_how_far_it_has_come(remote, server, monkeypatch):
    import remote_in_process

    def program(model, session, job):
        from remote_in_process import met, server

        for number in range(3):
            nnsight_eager.report(number, 3, "prompts")
            met.append(server.progress(session, job))
            if number == 1:
                server.cancel(session, job)
        return "to its end"

    monkeypatch.setattr(remote_in_process, "server", server, raising=False)
    monkeypatch.setattr(remote_in_process, "met", [], raising=False)
    line = remote._tree.line
    future = remote.submit(program, line.session.session, line._count + 1)
    with pytest.raises(RunEndedError, match=r"^The function was cancelled by its client\.\n"):
        future.result()
    assert repr(future) == "<program on tiny: done>"
    assert remote_in_process.met == [(0, 3, "prompts"), (1, 3, "prompts")]
    assert future.progress == (0, 0, "")


def test_a_function_of_a_client_that_is_gone_is_ended(remote, server, monkeypatch):
    import remote_in_process

    def program(model, session):
        from remote_in_process import server

        server.leave(session)
        model.trace("Paris").result
        return "to its end"

    monkeypatch.setattr(remote_in_process, "server", server, raising=False)
    with pytest.raises(RunEndedError, match="The client that has submitted this function has given no sign of life"):
        remote.submit(program, remote._tree.line.session.session).result()


@pytest.mark.parametrize(
    ("refused", "error", "said"),
    [
        (
            lambda model: model.trace(PROMPT, fn=len).__enter__(),
            RemoteError,
            "`fn=len` cannot be sent.\nName a method of the model",
        ),
        (lambda model: _in_a_block(model, lambda: model.transformer.h[0](1, hook=True)), RemoteError, "Leave `hook=True` away"),
        (
            lambda model: _in_a_block(model, lambda: model.lm_head(torch.ones(3))),
            RuntimeError,
            "cannot be multiplied (1x3 and 32x320)",
        ),
        (lambda model: model.trace(PROMPT).start().to(3), RemoteError, "`3` names no point.\nGive an envoy or a path."),
        (lambda model: model.trace(PROMPT).start().stop(), nnsight_eager.RunError, "`run.close()` abandons it."),
        (lambda model: model.trace().start(), nnsight_eager.RunError, 'Write `model.trace("...").start()`.'),
        (lambda model: model.activations("nowhere"), nnsight_eager.ExtractError, "`nowhere`"),
    ],
)
def test_what_cannot_be_done_there_is_a_sentence(refused, error, said, remote):
    with pytest.raises(error) as caught:
        refused(remote)
    assert said in "\n".join((str(caught.value), *getattr(caught.value, "__notes__", ())))


def _in_a_block(model, call):
    with model.trace(PROMPT):
        call()


def test_an_extraction_shows_how_far_it_has_come_and_a_text_that_is_not_there_is_named(remote, tmp_path, monkeypatch):
    from nnsight_eager.remote import extracting

    done = extracting._wait

    class Slow:
        """A function that ends when it has been looked at three times."""

        looked = 0

        @property
        def progress(self):
            from nnsight_eager.remote.jobs import Progress

            return Progress(self.looked, 3, "tokens")

        def done(self):
            self.looked += 1
            return self.looked > 3

    monkeypatch.setattr(extracting, "LOOK", 0)
    shown = []
    monkeypatch.setattr(extracting, "progress", lambda *given: _noting(shown, given))
    done(Slow())
    assert shown == [("Extracting", 3, 0, "tokens"), 1, 1, 1]
    stored = remote.extract([PROMPT, OTHER], ["transformer.h.0"], tmp_path / "there")
    far = remote.activations(tmp_path / "there")
    assert far.points == stored.points
    assert far[-1].keys() == ["transformer.h.0"]
    with pytest.raises(IndexError, match=r"There are 2 texts; there is no \[2\]"):
        far[2]


@contextlib.contextmanager
def _noting(shown, given):
    shown.append(given)
    yield shown.append


def test_a_lost_run_is_repeated_as_often_as_is_said_and_then_told_of(remote, monkeypatch):
    from nnsight_eager.remote.line import Lost

    line = remote._tree.line
    go, lost = line.go, []

    def dies(message):
        if lost:
            raise lost.pop()
        return go(message)

    monkeypatch.setattr(line, "go", dies)
    monkeypatch.setattr(line, "wait_until_back", lambda: None, raising=False)
    with remote.trace(PROMPT):
        expected = remote.transformer.h[1].output
    with remote.trace(PROMPT, retries=2):
        remote.transformer.h[0].output
        lost.extend([Lost("once"), Lost("again")])
        assert remote.transformer.h[1].output.equal(expected)
    assert not lost
    assert not [name for name in frames_on_other_stacks() if "forward" in name]  # of a run that was not lost after all
    with pytest.raises(nnsight_eager.ServerLostError) as caught, remote.trace(PROMPT, retries=1):
        lost.extend([Lost("for good"), Lost("at first")])
        remote.transformer.h[0].output
    assert str(caught.value).startswith(
        "The actor `tiny` has died, and with it run 3 (`forward`), which had not come to a point."
    )
    assert "Ray says: for good." in str(caught.value)


def test_a_future_whose_server_is_away_is_looked_at_without_waiting_and_runs_when_it_is_back(remote, monkeypatch):
    line, back, lost = remote._tree.line, threading.Event(), []
    await_function = line.await_function

    def dies(reference, timeout):
        if not lost:
            lost.append(reference)
            raise nnsight_eager.ServerLostError("gone", "again", name="tiny")
        return await_function(reference, timeout)

    monkeypatch.setattr(line, "await_function", dies)
    monkeypatch.setattr(line, "wait_until_back", lambda wanted: back.wait(60))
    future = remote.submit(lambda model: model.trace([[1, 2, 3]]).result.logits.shape[1], retries=1)
    assert not future.done()
    assert future.progress == (0, 0, "")
    assert repr(future) == "<<lambda> on tiny: 0 of 0>"
    with pytest.raises(TimeoutError):
        future.result(timeout=0.01)
    assert not back.is_set()  # nothing of this has waited for the server
    back.set()
    assert future.result(60) == 3
    assert len(lost) == 1


def test_with_several_ranks_what_a_client_has_is_taken_away_when_no_call_of_it_is_under_way(folder, tmp_path):
    from remote_in_process import client

    from nnsight_eager.remote.ranks import First
    from nnsight_eager.remote.serving import Server
    from nnsight_eager.remote.sessions import Limits

    done, begun, go = [], tmp_path / "begun", tmp_path / "go"

    class Noting(First):
        several = False  # the model is whole here

        def __init__(self):
            super().__init__([], lambda doing: None, lambda: None)

        @contextlib.contextmanager
        def alike(self, method, *args):
            with super().alike(method, *args) as call:
                yield call
                done.append(method)

    server = Server(str(folder("gpt2")), "tiny", {}, Limits(silence=1e6), Noting())
    model = client(server)
    line, session = model._tree.line, model._tree.line._opened.session

    def waits(_, handle):
        begun.touch()
        wait_until(go.exists)
        return handle.sum()

    with model.trace(PROMPT):
        handle = model.transformer.h[0].output_ref
    future = model.submit(waits, handle)
    wait_until(begun.exists)
    done.clear()
    assert server.beat(session, [("ref", handle._number)])
    assert handle.norm() > 0  # another call of the client, which has begun before what it names is let go
    server.leave(session)
    assert done == ["handled"]
    assert server.call(session, "lm_head", None) == ("unknown", None)  # nothing begins any more
    go.touch()
    future.result(60)
    wait_until(lambda: "leave" in done)
    assert done == ["handled", "run_function", "beat", "close", "leave"]
    assert server.status()["clients"] == []
    line.threads.shutdown()


def test_the_magics_lead_a_run_there_and_know_its_paths(remote, local, shell):
    from nnsight_eager.interactive.magics import HeldRunMagics

    shell.user_ns["remote"] = remote
    magics = HeldRunMagics(shell)
    typed = SimpleNamespace(text_until_cursor="%to transformer.h.1.m", token="transformer.h.1.m")
    assert magics.completions(typed)["completions"] == []  # nothing is held
    magics.trace(f"remote {PROMPT!r}")
    assert [each.text for each in magics.completions(typed)["completions"]] == [
        path for path, _ in local._module.named_modules() if path.startswith("transformer.h.1.m")
    ]
    assert repr(magics.to("transformer.h.1.mlp input")) == "paused at model.transformer.h[1].mlp.input (GPT2MLP), step 0"
    magics.over("")
    remote.transformer.h[1].mlp.output *= 0
    magics.to("lm_head")
    magics.back("transformer.h.0")
    magics.back("")
    with torch.no_grad(), local.trace(PROMPT):
        assert magics.finish("").result.logits.equal(local.lm_head.output)


def test_a_run_that_is_over_says_so(remote):
    with remote.trace(PROMPT) as tracer:
        remote.transformer.h[0].output
    for asked in (lambda: tracer.model.transformer.h[1].output, lambda: tracer._run.to_step(1)):
        with pytest.raises(RunEndedError, match=r"This run has ended\."):
            asked()
    with pytest.raises(RuntimeError, match="normalized_shape"), remote.trace(PROMPT) as failed:
        remote.transformer.h[0].output = torch.zeros(1, 2, 3)
        remote.transformer.h[2].output
    with pytest.raises(RunEndedError, match="This run has ended: its forward pass raised `RuntimeError`"):
        failed.result
    with pytest.raises(ZeroDivisionError), remote.trace(PROMPT) as left:
        remote.transformer.h[0].output
        1 / 0
    with pytest.raises(RunEndedError, match="This run was closed before its end, so it has no result"):
        left.result


def test_what_is_there_already_travels_by_name_and_what_is_not_is_named(remote):
    from nnsight_eager.remote.addresses import Paths

    paths = Paths(remote._module)
    assert paths.name(remote._module.lm_head) == ("module", "lm_head")
    assert paths.name(torch.nn.Linear(1, 1)) is None
    with pytest.raises(RemoteError, match="`Linear` is not in the model where it runs"):
        paths.path(torch.nn.Linear(1, 1))
    with pytest.raises(RemoteError, match=r"The model has no `transformer\.other` where it runs"):
        paths.module("transformer.other")


def test_a_tensor_that_arrives_under_inference_mode_can_be_changed_and_counted():
    from nnsight_eager.remote.packing import packed, unpacked

    with torch.inference_mode():
        arrived = unpacked(packed(torch.ones(2)))
    before = arrived._version
    arrived.add_(1)
    assert arrived._version == before + 1


def test_what_only_this_process_can_import_is_sent_by_value_where_it_has_to_be():
    from remote_in_process import travelled

    from nnsight_eager.remote.packing import packed, unpacked

    assert unpacked(travelled(packed({"function": lambda x: x + 1}, by_value=False)))["function"](1) == 2


def test_a_run_that_cannot_begin_leaves_its_lane_to_the_next(remote, server):
    with remote.trace(PROMPT):
        handle = remote.transformer.h[0].output_ref
    session = server._sessions[remote._tree.line.session.session]
    session.refs.clear()
    idle = len(server._lanes._idle)
    with pytest.raises(RemoteError, match="What this handle is of is not kept any more"), remote.trace(inputs_embeds=handle):
        remote.transformer.h[0].output
    assert len(server._lanes._idle) == idle
    assert not [seat for seat in session.seats.values() if not seat.ended]
    with remote.trace(PROMPT):
        assert remote.transformer.h[0].output.shape == handle.shape
