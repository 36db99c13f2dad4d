"""The operations inside a forward as points: read, replaced, left out, in loops, in what they call; nothing stays behind."""

import contextlib
import copy
import functools
import gc
import itertools
import pickle
import sys
import threading
import weakref

import pytest
import torch
import transformers
from left_behind import everything, frames_on_other_stacks
from small_models import hooked

from nnsight_eager import LanguageModel, NNsight, NotReachedError, OutOfOrderError, SourceError
from nnsight_eager.errors import ChangedInPlaceError, InsideForwardError, OutsideTraceError
from nnsight_eager.taps import own_forward

PROMPT = "The Eiffel Tower is in"
X = torch.arange(3.0).reshape(1, 3)


def shifted(x, by=1):
    moved = x + by
    return moved


def halved(x):
    parts = x.chunk(2, -1)
    return parts[0]


class Block(torch.nn.Module):
    """A block with operations of many kinds, to be computed by hand."""

    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(3, 3)
        self.hooks = []

    def forward(self, x, flag=False):
        hidden = self.lin(x)
        hidden = shifted(torch.relu(hidden), by=2)
        if flag:
            hidden = hidden.neg()
        for hook in self.hooks:
            hook()
        hidden += x
        return hidden

    def by_hand(self, x, lin=lambda v: v, relu=lambda v: v, moved=lambda v: v, end=lambda v: v):
        return end(moved(relu(torch.relu(lin(self.lin(x)))) + 2) + x)


class Net(torch.nn.Module):
    """Two blocks in a loop, and functions in a loop of which each is its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))
        self.head = torch.nn.Linear(3, 4)
        self.ends = [torch.tanh, shifted]

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        for end in self.ends:
            x = end(x)
        return self.head(x)

    def generate(self, x, steps=3):
        for _ in range(steps):
            x = self(x)[:, :3]
        return x


@pytest.fixture
def model():
    return NNsight(Net())


@pytest.fixture
def block(model):
    return model.blocks[0]


@contextlib.contextmanager
def as_before(model):
    """The block leaves nothing on the model and no frame of it paused."""
    before = everything(model)
    yield
    assert everything(model) == before
    assert not [name for name in frames_on_other_stacks() if "forward" in name]


def sentence(error, run):
    """The whole message of the error that `run` raises."""
    with pytest.raises(error) as caught:
        run()
    return str(caught.value)


# Values


def test_operations_are_read_as_they_are_computed(model, block):
    net = model._module.blocks[0]
    with model.trace(X):
        source = block.source
        assert torch.equal(source.self_lin_0.input, X)
        lin = source.self_lin_0.output
        assert torch.equal(source.hidden_0.input, lin)
        relu = source.torch_relu_0.output
        (given,), keywords = source.shifted_0.inputs
        shift = source.shifted_0.output
        total = source.hidden_iadd_0.output
        assert block.output is total
    assert torch.equal(lin, net.lin(X))
    assert torch.equal(relu, torch.relu(lin))
    assert given is relu
    assert keywords == {"by": 2}
    assert torch.equal(total, net.by_hand(X))
    assert shift.shape == lin.shape


@pytest.mark.parametrize(
    ("name", "part"), [("self_lin_0", "lin"), ("hidden_0", "lin"), ("torch_relu_0", "relu"), ("shifted_0", "moved"),
                       ("hidden_1", "moved"), ("hidden_iadd_0", "end")],
)  # fmt: skip
@pytest.mark.parametrize("way", ["output", "skip"])
def test_what_is_replaced_or_left_out_is_as_in_a_forward_edited_by_hand(model, block, name, part, way):
    new = torch.tensor([[3.0, -2.0, 1.0]])
    with model.trace(X):
        if way == "output":
            block.source[name].output = new * 2
        else:
            block.source[name].skip(new * 2)
        out = block.output
    expected = model._module.blocks[0].by_hand(X, **{part: lambda value: new * 2})
    assert torch.equal(out, expected)


def test_inputs_of_an_operation_are_replaced(model, block):
    net = model._module.blocks[0]
    with model.trace(X):
        block.source.torch_relu_0.input = block.source.torch_relu_0.input * -2
        block.source.shifted_0.inputs = (block.source.shifted_0.inputs[0], {"by": 7})
        out = block.source.shifted_0.output.clone()  # the forward adds to it in place
    assert torch.equal(out, torch.relu(net.lin(X) * -2) + 7)


def test_an_operation_of_what_is_called_is_a_point_too(model, block):
    with model.trace(X) as tracer:
        assert list(block.source.shifted_0.source) == ["moved_0"]
        block.source.shifted_0.source.moved_0.output *= 3
        first = block.output
    expected = model._module.blocks[0].by_hand(X, moved=lambda value: value * 3)
    assert torch.equal(first, expected)
    assert tracer.result.shape == (1, 4)


def test_a_function_of_a_loop_is_left_out(model):
    with model.trace(X):
        model.source.end_0.next().skip(X)
        assert torch.equal(model.source.end_0.next().input, X)


def test_the_output_is_asked_for_from_inside_the_call(model, block):
    with model.trace(X):
        moved = block.source.shifted_0.source.moved_0.output
        assert block.source.shifted_0.output is moved
        with pytest.raises(ChangedInPlaceError):
            block.source.shifted_0.input
        with pytest.raises(OutOfOrderError):
            block.source.self_lin_0.output
        block.source.shifted_0.output = moved * 5
        out = block.source.hidden_1.output.clone()
    assert torch.equal(out, (torch.relu(model._module.blocks[0].lin(X)) + 2) * 5)


def test_the_input_cannot_be_asked_for_from_inside_the_call(model, block):
    with model.trace(X):
        block.source.shifted_0.source.moved_0.output
        with pytest.raises(OutOfOrderError):
            block.source.shifted_0.input
        moved = block.source.shifted_0.output
        assert moved.shape == X.shape


def test_the_next_input_is_that_of_the_next_call(model):
    model._module.ends[:] = [shifted, shifted]
    with model.trace(X):
        moved = model.source.end_0.source.moved_0.output
        assert model.source.end_0.next().input is moved


def test_a_call_that_has_failed_is_over():
    class Trying(torch.nn.Module):
        def forward(self, x):
            try:
                y = halved(x[0, 0].shape)
            except AttributeError:
                y = shifted(x)
            return torch.relu(y)

    model = NNsight(Trying())
    with model.trace(X):
        model.source.shifted_0.input
        with pytest.raises(OutOfOrderError):
            model.source.halved_0.output


def test_gradients_flow_through_an_operation(model, block):
    with model.trace(X):
        hidden = block.source.torch_relu_0.output
        hidden.retain_grad()
        loss = model.output.sum()
    loss.backward()
    net = Net()
    kept = {}

    def keep(value):
        value.retain_grad()
        return kept.setdefault("relu", value)

    x = net.blocks[1](net.blocks[0].by_hand(X, relu=keep))
    net.head(shifted(torch.tanh(x))).sum().backward()
    assert torch.equal(hidden.grad, kept["relu"].grad)


# Real architectures


def arguments(model):
    """What the model is called with in a trace of the prompt; afterwards it is loaded."""
    with model.trace(PROMPT):
        _, kwargs = model.inputs
    return kwargs


@pytest.mark.parametrize(
    ("kind", "owner", "projection", "operation"),
    [
        ("gpt2", "transformer.h.1.attn", "c_proj", "self_c_proj_0"),
        ("llama", "model.layers.1.self_attn", "o_proj", "self_o_proj_0"),
        ("bert", "bert.encoder.layer.1.attention.self", "query", "self_query_0"),
        ("t5", "encoder.block.1.layer.0.SelfAttention", "o", "self_o_0"),
    ],
)
def test_operations_of_real_attention_are_what_hooks_see(folder, kind, owner, projection, operation):
    model = LanguageModel(folder(kind))
    kwargs = arguments(model)
    expected = hooked(model._module, lambda: model._module(**kwargs), f"{owner}.{projection}")[0][0]
    with as_before(model), model.trace(PROMPT):
        source = model[owner].source
        assert operation in source
        assert torch.equal(source[operation].output, expected)


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 has other code here, and so other names")
@pytest.mark.parametrize(("kind", "owner"), [("gpt2", "transformer.h.1.attn"), ("llama", "model.layers.1.self_attn")])
def test_the_attention_interface_is_followed_down_to_sdpa(folder, kind, owner):
    model = LanguageModel(folder(kind))
    with torch.no_grad(), model.trace(PROMPT):
        interface = model[owner].source.attention_interface_1
        interface.input
        sdpa = interface.source["torch_nn_functional_scaled_dot_product_attention_0"]
        args, kwargs = sdpa.inputs
        got = sdpa.output
        mixed = interface.output[0]
    again = torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)
    assert torch.equal(again, got)
    assert torch.equal(got.transpose(1, 2), mixed)


def test_an_attention_that_is_zeroed_leaves_the_projections_bias(gpt2):
    attn = gpt2.transformer.h[0].attn
    with torch.no_grad(), gpt2.trace(PROMPT):
        attn.source.contiguous_0.output = attn.source.contiguous_0.output * 0
        out = attn.c_proj.output
    assert torch.equal(out, attn.c_proj.bias.expand_as(out))


def mixtral(experts="eager"):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    return LanguageModel(transformers.MixtralForCausalLM._from_config(config, experts_implementation=experts).eval())


IDS = torch.arange(3, 11).reshape(1, 8)


@pytest.mark.skipif(transformers.__version__ < "5", reason="experts are modules in transformers 4")
def test_the_experts_of_a_mixture_are_reached_in_their_loop():
    model = mixtral()
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad(), model.trace(input_ids=IDS):
        given, index, weights = experts.inputs[0]
        loop = experts.source.experts_forward_1
        loop.input
        down = next(name for name in loop.source if name.endswith("linear_1"))
        each = [visit.output for visit in loop.source[down].visits()]
        out = experts.output
    module = experts._module
    used = sorted(set(index.flatten().tolist()))
    assert len(each) == len(used)
    total = torch.zeros_like(given)
    for number, seen in zip(used, each, strict=True):
        position, token = torch.where(number == index.T)
        gate, up = (given[token] @ module.gate_up_proj[number].T).chunk(2, -1)
        expected = (torch.nn.functional.silu(gate) * up) @ module.down_proj[number].T
        assert torch.allclose(seen, expected, atol=1e-5)
        total.index_add_(0, token, seen * weights[token, position, None])
    assert torch.allclose(total, out, atol=1e-5)


# Loops


def test_an_operation_in_a_loop_is_reached_visit_by_visit(model):
    outs = hooked(model._module, lambda: model._module(X), "blocks.0", "blocks.1")
    with model.trace(X):
        first = model.source.block_0.output
        second = model.source.block_0.next().output
    assert torch.equal(first, outs[0][0])
    assert torch.equal(second, outs[1][0])


def test_visits_go_over_those_of_one_step(model):
    with model.trace(X, steps=2, fn="generate") as tracer:
        seen = [[visit.output for visit in model.source.block_0.visits()] for _ in tracer.iter[:]]
    outs = hooked(model._module, lambda: model._module.generate(X, steps=2), "blocks.0", "blocks.1")
    assert [len(each) for each in seen] == [2, 2]
    for step, (first, second) in enumerate(seen):
        assert torch.equal(first, outs[0][step])
        assert torch.equal(second, outs[1][step])


def test_every_visit_can_be_changed(model):
    with model.trace(X) as tracer:
        for visit in model.source.block_0.visits():
            visit.output = visit.output * 0
    expected = model._module.head(shifted(torch.tanh(torch.zeros(1, 3))))
    assert torch.equal(tracer.result, expected)


def test_the_functions_of_a_loop_each_have_their_own_source(model):
    with model.trace(X):
        visits = model.source.end_0
        visits.input
        with pytest.raises(SourceError, match="not written in Python"):
            _ = visits.source
        following = visits.next()
        following.input
        assert list(following.source) == ["moved_0"]
        moved = following.source.moved_0.output
        assert torch.equal(moved, model.head.input)


def test_loops_in_loops_end_where_the_call_around_them_ends(model):
    model._module.ends[:] = [shifted, shifted, shifted]
    with model.trace(X):
        outer = model.source.end_0
        seen = [
            (visit.input, [inner.output for inner in outer.source.moved_0.visits()], visit.output) for visit in outer.visits()
        ]
    assert [len(inner) for _, inner, _ in seen] == [1, 1, 1]
    assert all(torch.equal(given + 1, inner[0]) and inner[0] is after for given, inner, after in seen)


def test_the_first_use_may_be_in_a_later_step_of_a_generation(folder):
    model = LanguageModel(folder("gpt2"))
    settings = {"max_new_tokens": 4, "min_new_tokens": 4}
    attn = model.transformer.h[1].attn
    plain = model.generate(PROMPT, **settings).result
    expected = hooked(model._module, lambda: model.generate(PROMPT, **settings).result, "transformer.h.1.attn.c_proj")[0]
    with model.generate(PROMPT, **settings) as tracer:
        seen = {}
        for step in tracer.iter[:]:
            if step >= 2:
                seen[step] = attn.source.self_c_proj_0.output
    assert list(seen) == [2, 3]
    assert all(torch.equal(seen[step], expected[step]) for step in seen)
    assert torch.equal(tracer.result, plain)


def test_an_operation_may_be_asked_for_first_at_the_start_of_a_later_call(model, block):
    with model.trace(X, steps=2, fn="generate") as tracer:
        block.source.self_lin_0.output
        for _ in tracer.iter[1:]:
            block.input
            relu = block.source.torch_relu_0.output
    lins = hooked(model._module, lambda: model._module.generate(X, steps=2), "blocks.0.lin")[0]
    assert torch.equal(relu, torch.relu(lins[1]))


def test_the_next_token_has_its_operation_too(model):
    with model.trace(X, steps=3, fn="generate") as tracer:
        first = model.blocks[0].source.self_lin_0.output
        second = model.blocks[0].source.self_lin_0.next().output
        for _ in tracer.iter[2:]:
            third = model.blocks[0].source.self_lin_0.output
    lins = hooked(model._module, lambda: model._module.generate(X), "blocks.0.lin")[0]
    assert all(torch.equal(*pair) for pair in zip((first, second, third), lins, strict=True))


def test_the_next_call_of_a_module_has_no_source_before_it_is_met(model, block):
    with pytest.raises(SourceError) as caught, model.trace(X):
        block.next().source
    assert str(caught.value).splitlines()[1] == (
        "Ask the operation for its next visit: `model.blocks[0].source.name_0.next().output`."
    )


def test_a_further_visit_is_refused_inside_a_forward_whose_own_nobody_hears(model):
    def read():
        model.blocks[0].lin.output
        model.blocks[0].source.shifted_0.next().output

    with pytest.raises(OutOfOrderError, match="not reached any more"):
        trace(model, read, X)()


# Invokes, edits, caches, scans


def test_an_invoke_reads_and_writes_its_rows(model):
    both = torch.randn(2, 3)

    def zero():
        model.blocks[0].source.torch_relu_0.output = model.blocks[0].source.torch_relu_0.output * 0

    with model.trace() as tracer:
        tracer.invoke(both[:1], zero)
        mine = tracer.invoke(both[1:], lambda: model.blocks[0].source.torch_relu_0.output)
        every = tracer.invoke(lambda: model.blocks[0].source.shifted_0.output.clone())
    net = model._module.blocks[0]
    assert torch.allclose(mine.result, torch.relu(net.lin(both[1:])))
    assert torch.equal(every.result[:1], torch.full((1, 3), 2.0))
    assert torch.allclose(every.result[1:], mine.result + 2)


def test_invokes_go_over_the_visits_of_a_loop_together(model):
    both = torch.randn(2, 3)

    def seen():
        return [visit.output.clone() for visit in model.source.block_0.visits()]

    with model.trace() as tracer:
        bodies = [tracer.invoke(each, seen) for each in both.split(1)]
    outs = hooked(model._module, lambda: model._module(both), "blocks.0", "blocks.1")
    for row, body in enumerate(bodies):
        assert [tuple(each.shape) for each in body.result] == [(1, 3)] * 2
        assert all(torch.allclose(each, out[0][row : row + 1]) for each, out in zip(body.result, outs, strict=True))


def test_a_stored_edit_may_use_an_operation(model):
    with model.edit() as edited:
        model.blocks[0].source.torch_relu_0.output = model.blocks[0].source.torch_relu_0.output * 0
    with as_before(model):
        for _ in range(2):
            with edited.trace(X):
                out = edited.blocks[0].output
            assert torch.equal(out, 2 + X)
    plain = model.trace(X).result
    assert torch.equal(plain, model._module(X))


def test_a_stored_edit_changes_every_step(model):
    def zero():
        model.blocks[0].source.torch_relu_0.output = model.blocks[0].source.torch_relu_0.output * 0

    with model.edit(zero).trace(X, steps=3, fn="generate") as tracer:
        seen = [model.blocks[0].source.shifted_0.output.clone() for _ in tracer.iter[:]]
    assert all(torch.equal(each, torch.full((1, 3), 2.0)) for each in seen)
    assert len(seen) == 3


def test_a_cache_beside_it_sees_the_same(model, block):
    with model.trace(X) as tracer:
        kept = tracer.cache(modules=["blocks.0", "blocks.0.lin"])
        block.source.torch_relu_0.output *= 0
    assert torch.equal(kept["model.blocks.0"].output, 2 + X)
    assert torch.equal(kept["model.blocks.0.lin"].output, model._module.blocks[0].lin(X))


@pytest.mark.skipif(transformers.__version__ < "5", reason="attention masks of transformers 4 choose by values")
def test_a_scan_has_the_shapes_of_operations(gpt2):
    with gpt2.scan(PROMPT):
        shape = gpt2.transformer.h[0].attn.source.attention_interface_1.output[0].shape
    with gpt2.trace(PROMPT):
        assert gpt2.transformer.h[0].attn.source.attention_interface_1.output[0].shape == shape


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 has other code here, and so other names")
def test_the_pattern_of_an_attention_is_read_beside_its_operations(gpt2):
    attn = gpt2.transformer.h[0].attn
    arguments(gpt2)
    with as_before(gpt2), torch.no_grad(), gpt2.trace(PROMPT):
        query = attn.source.query_states_1.output
        pattern = attn.pattern
        mixed = attn.source.attention_interface_1.output[0]
        projected = attn.source.self_c_proj_0.input
    assert query.shape[:2] == pattern.shape[:2]
    assert torch.equal(mixed.reshape(projected.shape), projected)


# Several runs


def test_a_run_goes_on_from_the_input_of_an_operation_when_another_that_met_it_has_ended(model, block):
    x = torch.ones(1, 3)
    first, second = model.trace(x), model.trace(x * 2)
    for run in (first, second):
        run.__enter__()
        run.model.blocks[0].source.torch_relu_0.input
    first.__exit__(None, None, None)
    seen = second.model.blocks[0].output
    second.__exit__(None, None, None)
    assert torch.equal(seen, block._module(x * 2))


def test_two_threads_trace_one_block_with_its_source_and_without(model, block):
    net, wrong, together = model._module, [], threading.Barrier(3)

    def work(number):
        together.wait()
        for turn in range(30):
            x = torch.full((1, 3), float(number + turn))
            with model.trace(x) as tracer:
                if number == 2:
                    out = block.output
                else:
                    block.source.torch_relu_0.output = block.source.torch_relu_0.output * number
                    out = block.output
            expected = net.blocks[0].by_hand(x, relu=(lambda v: v) if number == 2 else lambda v: v * number)
            if not (torch.equal(out, expected) and tracer.result.shape == (1, 4)):
                wrong.append((number, turn))

    with as_before(model):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("hooked", [False, True])
def test_traces_that_are_open_together_each_have_their_operations(model, block, order, hooked):
    net = model._module.blocks[0]
    if hooked:
        from accelerate.hooks import ModelHook, add_hook_to_module

        add_hook_to_module(net, ModelHook())
    relus, outs = {}, {}
    with as_before(model), contextlib.ExitStack() as open_together:
        traces = [open_together.enter_context(model.trace(X + number)) for number in range(3)]
        sources = [each.model.blocks[0].source for each in traces]  # each is there before any comes to the block
        for number in order:
            relus[number] = sources[number].torch_relu_0.output
            sources[number].torch_relu_0.output = relus[number] * number
        for number in reversed(order):
            outs[number] = traces[number].model.blocks[0].output
    for number in range(3):
        assert torch.equal(relus[number], torch.relu(net.lin(X + number)))
        assert torch.equal(outs[number], net.by_hand(X + number, relu=lambda value, number=number: value * number))


def test_a_trace_inside_a_trace_has_operations_of_its_own(model, block):
    with as_before(model), model.trace(X) as outer:
        first = block.source.self_lin_0.output
        with model.trace(X * 2):
            inner = block.source.torch_relu_0.output
            block.source.torch_relu_0.output = inner * 0
            assert torch.equal(block.output, 2 + X * 2)
        relu = outer.model.blocks[0].source.torch_relu_0.output
        out = outer.model.blocks[0].output
    net = model._module.blocks[0]
    assert torch.equal(first, net.lin(X))
    assert torch.equal(inner, torch.relu(net.lin(X * 2)))
    assert torch.equal(relu, torch.relu(first))
    assert torch.equal(out, net.by_hand(X))


def test_the_model_may_be_called_in_the_body(model, block):
    plain = model._module(X)
    with model.trace(X) as tracer:
        block.source.torch_relu_0.output *= 0
        assert torch.equal(model._module(X), plain)
        out = block.output
    assert torch.equal(out, 2 + X)
    assert not torch.equal(tracer.result, plain)


def test_two_models_may_share_a_module():
    shared = Block()
    one, two = NNsight(torch.nn.Sequential(shared)), NNsight(torch.nn.Sequential(shared, torch.nn.ReLU()))
    with as_before(one), as_before(two), one.trace(X), two.trace(X):
        one[0].source.torch_relu_0.output = one[0].source.torch_relu_0.output * 0
        seen = two[0].source.torch_relu_0.output
        assert torch.equal(one[0].output, 2 + X)
        assert torch.equal(two[0].output, shared.by_hand(X))
    assert torch.equal(seen, torch.relu(shared.lin(X)))


def test_a_module_of_two_names_is_one_point():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = Net()
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x)[:, :3])

    model = NNsight(Twice())
    for envoy in (model.a, model.b):
        with model.trace(X):
            first = envoy.source.end_0.input
            with pytest.raises(SourceError, match="not written in Python"):
                _ = envoy.source.end_0.source
            again = [visit.input for visit in model.a.source.end_0.visits()]
        assert not any(torch.equal(first, each) for each in again)
        assert len(again) in (1, 3)


class Recursive(torch.nn.Module):
    """Calls itself."""

    def forward(self, x, depth=3):
        if not depth:
            return x
        deeper = self(x + 1, depth - 1)
        return deeper * 2


def test_a_module_that_calls_itself_has_a_visit_for_each_depth():
    model = NNsight(Recursive())
    with as_before(model), model.trace(X) as tracer:
        depths = [visit.inputs[0][1] for visit in model.source.self_0.visits()]
    assert depths == [2, 1, 0]
    assert torch.equal(tracer.result, (X + 3) * 8)
    with model.trace(X):
        outer = model.source.self_0.output
        after = model.source.deeper_0.next().output
    assert torch.equal(outer, (X + 3) * 4)
    assert after is outer


# What cannot be had


def trace(model, read, *args):
    def run():
        with model.trace(*(args or (X,))):
            read()

    return run


def test_an_operation_that_has_been_passed_is_an_error(model, block):
    def read():
        block.source.torch_relu_0.output
        block.source.self_lin_0.output

    assert sentence(OutOfOrderError, trace(model, read)) == (
        "`model.blocks[0].source.self_lin_0.output` is not reached any more: it was asked for when the forward of "
        "`model.blocks[0]` had begun, or had come past it.\n"
        "Read `model.blocks[0].source.self_lin_0.output` above the line that reads "
        "`model.blocks[0].source.torch_relu_0.output`; where it comes behind that, write `model.blocks[0].source` above that "
        "line."
    )


def test_an_operation_whose_forward_has_ended_is_an_error(model, block):
    def read():
        model.blocks[1].input
        block.source.self_lin_0.output

    assert sentence(OutOfOrderError, trace(model, read)) == (
        "`model.blocks[0].source.self_lin_0.output` has already run in this step (step 0); the model was paused at "
        "`model.blocks[1].input`.\n"
        "Read `model.blocks[0].source.self_lin_0.output` above the line that reads `model.blocks[1].input`; for a later visit "
        "of it write `model.blocks[0].source.self_lin_0.next().output`."
    )


def test_a_forward_that_had_begun_unheard_is_an_error_at_once(model, block):
    def read():
        block.lin.output
        block.source.shifted_0.output

    assert sentence(OutOfOrderError, trace(model, read)) == (
        "`model.blocks[0].source.shifted_0.output` is not reached any more: it was asked for when the forward of "
        "`model.blocks[0]` had begun, or had come past it.\n"
        "Read `model.blocks[0].source.shifted_0.output` above the line that reads `model.blocks[0].lin.output`; where it comes "
        "behind that, write `model.blocks[0].source` above that line."
    )


def test_looking_at_the_source_first_is_enough(model, block):
    with model.trace(X):
        source = block.source
        block.lin.output
        assert torch.equal(source.shifted_0.output, block.source.shifted_0.output)


def test_a_branch_that_is_not_taken_is_an_error_and_the_model_goes_on(model, block):
    assert sentence(NotReachedError, trace(model, lambda: block.source.hidden_neg_0.output)) == (
        "`model.blocks[0].source.hidden_neg_0.output` did not run: the forward of `model.blocks[0]` went another way.\n"
        "Read an operation that this call runs; `print(model.blocks[0].source)` shows where they stand."
    )


def test_what_lies_in_what_is_left_out_does_not_run(model, block):
    def leave_out_the_block():
        block.skip(X)
        block.source.torch_relu_0.output

    def leave_out_the_call():
        block.source.shifted_0.skip(X)
        block.source.shifted_0.source.moved_0.output

    assert sentence(NotReachedError, trace(model, leave_out_the_block)) == (
        "`model.blocks[0].source.torch_relu_0.output` does not run in this step: it is inside `model.blocks[0]`, which was "
        "skipped.\nRead it in a trace that does not skip that module."
    )
    assert sentence(NotReachedError, trace(model, leave_out_the_call)) == (
        "`model.blocks[0].source.shifted_0.source.moved_0.output` does not run in this step: it is inside "
        "`model.blocks[0].source.shifted_0`, which was skipped.\nRead it in a trace that does not skip that module."
    )


def test_an_unknown_name_is_refused_with_near_ones(block):
    expected = (
        "`model.blocks[0].source` has no operation `torch_rely_0`; did you mean `torch_relu_0`?\n"
        "`print(model.blocks[0].source)` lists them."
    )
    assert sentence(AttributeError, lambda: block.source.torch_rely_0) == expected
    assert sentence(SourceError, lambda: block.source["torch_rely_0"]) == expected


def test_an_unknown_name_in_what_is_called_is_refused_when_that_is_known(model):
    def read():
        model.source.end_0.source.movd_0.output

    model._module.ends.pop(0)
    assert sentence(SourceError, trace(model, read)) == (
        "`model.source.end_0.source` has no operation `movd_0`; did you mean `moved_0`?\n"
        "`print(model.source.end_0.source)` lists them."
    )


def test_what_is_built_in_has_no_source(block):
    assert sentence(SourceError, lambda: block.source.torch_relu_0.source) == (
        "`_VariableFunctionsClass.relu` is not written in Python, so it has no operations.\nRead its output and its inputs."
    )


def test_a_call_of_a_module_says_where_its_own_source_is(model, block):
    assert sentence(SourceError, lambda: block.source.self_lin_0.source) == (
        "`model.blocks[0].source.self_lin_0` calls a module.\nIts own source is `model.blocks[0].lin.source`."
    )
    assert sentence(SourceError, trace(model, lambda: model.source.block_0.source.hidden_0.output)) == (
        "`model.source.block_0` calls a module, of type `Block`.\n"
        "Read the `.source` of that module; `print(model)` shows where it is."
    )


def test_an_assignment_has_no_source(block):
    with pytest.raises(SourceError):
        list(block.source.hidden_0.source)


def test_the_forward_itself_cannot_ask_for_its_operations(model, block):
    def ask():
        block.source.hidden_iadd_0.output

    model._module.blocks[0].hooks.append(ask)
    with as_before(model), pytest.raises(InsideForwardError), model.trace(X):
        block.source.torch_relu_0.output


def test_outside_a_trace_there_is_the_listing_and_no_value(model, block):
    assert sentence(OutsideTraceError, lambda: block.source.torch_relu_0.output).startswith(
        "A point was asked for where no trace of this model is open."
    )


def test_a_trace_without_input_has_no_points_outside_its_invokes(model, block):
    def run():
        with model.trace() as tracer:
            tracer.invoke(X, lambda: None)
            block.source.torch_relu_0.output

    assert sentence(OutsideTraceError, run) == (
        "This was read outside every invoke, and its trace has no input of its own.\n"
        'Read it inside `with tracer.invoke("…"):`, or give the trace an input: `with model.trace("…"):`.'
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_scripted_modules_have_no_operations():
    model = NNsight(torch.jit.script(torch.nn.Linear(3, 3)))
    assert sentence(SourceError, lambda: model.source) == (
        "`Linear.forward` is not written in Python, so it has no operations.\nRead its output and its inputs."
    )


# Looking


def test_looking_never_runs_the_model(model, block):
    calls = []
    model._module.blocks[0].hooks.append(lambda: calls.append(1))
    with model.trace(X) as tracer:
        source, nested = block.source, model.source.end_0.source
        for each in (source, source.torch_relu_0, nested, nested.moved_0, source.shifted_0.source):
            repr(each), str(each), dir(each)
        assert not calls
        assert "torch_relu_0" in dir(source)
        assert tracer.result is not None
    assert calls == [1]
    assert repr(nested) == "<model.source.end_0.source: known when it is called>"
    assert repr(nested.moved_0) == "<model.source.end_0.source.moved_0>"
    assert nested


def test_looking_computes_no_property():
    class Computed(torch.nn.Module):
        @property
        def fused(self):
            raise ZeroDivisionError

        def forward(self, x, fuse=False):
            if fuse:
                x = self.fused.relu(x)
            return torch.relu(x)

    model = NNsight(Computed())
    assert repr(model.source.self_fused_relu_0) == "<model.source.self_fused_relu_0>"
    with model.trace(X):
        assert torch.equal(model.source.torch_relu_0.output, X)


def test_a_source_is_its_text_with_the_operations_beside_it(block):
    first = Block.forward.__code__.co_firstlineno
    head, *rows = repr(block.source).splitlines()
    assert head == f"model.blocks[0].source: Block.forward ({__file__}, line {first})"
    assert rows[:4] == [
        f"{'':13}   {first:4}     def forward(self, x, flag=False):",
        f"{'self_lin_0':>13} ┐",
        f"{'hidden_0':>13} → {first + 1:4}         hidden = self.lin(x)",
        f"{'torch_relu_0':>13} ┐",
    ]


@pytest.mark.filterwarnings("ignore:.*Completer.complete.*:PendingDeprecationWarning")
@pytest.mark.parametrize("text", ["model.blocks[0].source.torch_re", "model.blocks[0].source.torch_relu_0.sou"])
def test_completion_never_runs_the_model(shell, model, text):
    calls = []
    model._module.blocks[0].hooks.append(lambda: calls.append(1))
    shell.user_ns["model"] = model
    with model.trace(X):
        shell.complete(text)
        assert not calls


# Nothing stays behind


def reads(block):
    block.source.shifted_0.source.moved_0.output
    block.source.hidden_1.output


def test_afterwards_the_model_is_as_it_was(model, block):
    with as_before(model), model.trace(X):
        reads(block)


def test_so_it_is_when_the_body_raises_or_stops(model, block):
    with as_before(model), pytest.raises(ZeroDivisionError), model.trace(X):
        reads(block)
        raise ZeroDivisionError
    with as_before(model), model.trace(X) as tracer:
        reads(block)
        tracer.stop()


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, StopIteration, AttributeError])
def test_so_it_is_when_the_model_raises_inside_an_operation(model, block, error):
    def fail():
        raise error

    with as_before(model):
        model._module.blocks[0].hooks.append(fail)
        with pytest.raises(error), model.trace(X):
            block.source.hook_0.output
        with pytest.raises(error), model.trace(X):
            block.source.hook_0.inputs
            block.source.hidden_iadd_0.output
        model._module.blocks[0].hooks.clear()
    with model.trace(X):
        assert torch.equal(block.source.hidden_iadd_0.output, model._module.blocks[0].by_hand(X))


def test_a_forward_of_the_users_own_is_shown_and_put_back(model, block):
    net = model._module.blocks[0]
    inner = net.forward

    @functools.wraps(inner)
    def mine(*args, **kwargs):
        return inner(*args, **kwargs) * 10

    net.forward = mine
    assert "torch_relu_0" in list(block.source)
    with as_before(model), model.trace(X):
        block.source.torch_relu_0.output = block.source.torch_relu_0.output * 0
        out = block.output
    assert net.__dict__["forward"] is mine
    assert torch.equal(out, (2 + X) * 10)


def test_a_wrapper_that_does_not_say_what_it_wraps_is_followed(model, block):
    net = model._module.blocks[0]
    inner = net.forward
    net.forward = lambda *args, **kwargs: inner(*args, **kwargs) * 10
    with as_before(model), model.trace(X):
        assert list(block.source) == ["inner_0"]
        relu = block.source.inner_0.source.torch_relu_0.output
    assert torch.equal(relu, torch.relu(net.lin(X)))


def test_below_accelerates_hooks_there_is_the_forward_and_they_stay(model, block):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubling(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            return (args[0] * 2,), kwargs

        def post_forward(self, module, output):
            return output * 10

    net = model._module.blocks[0]
    add_hook_to_module(net, Doubling(), append=True)
    assert list(block.source) == list(model.blocks[1].source)
    with as_before(model), model.trace(X):
        relu = block.source.torch_relu_0.output
        block.source.torch_relu_0.output = relu * 0
        inner = block.source.shifted_0.source.moved_0.output.clone()  # which `hidden += x` changes
        out = block.output
    assert torch.equal(relu, torch.relu(net.lin(X * 2)))
    assert torch.equal(inner, torch.full((1, 3), 2.0))
    assert torch.equal(out, (2 + X * 2) * 10)
    assert torch.equal(net(X), net.by_hand(X * 2) * 10)


def test_a_partial_that_wraps_something_else_is_shown_itself(model, block):
    net = model._module.blocks[0]
    inner = net.forward

    def mine(module, x):
        return module.lin(x)

    net.forward = functools.update_wrapper(functools.partial(mine, net), inner)
    with as_before(model), model.trace(X):
        assert list(block.source) == ["module_lin_0"]
        assert torch.equal(block.source.module_lin_0.output, net.lin(X))


def test_a_copy_made_meanwhile_is_a_model_of_its_own(model, block):
    with model.trace(X):
        block.source.torch_relu_0.output *= 0
        copied, pickled = copy.deepcopy(model._module), pickle.loads(pickle.dumps(model._module))
    for each in (copied, pickled):
        assert torch.equal(each(X), model._module(X))
        assert not any("forward" in module.__dict__ for module in each.blocks)


def test_no_tensor_is_kept_after_a_trace(model, block):
    gc.disable()
    try:
        with model.trace(X):
            alive = [
                weakref.ref(block.source.self_lin_0.output),
                weakref.ref(block.source.shifted_0.source.moved_0.output),
                weakref.ref(block.source.hidden_1.output),
            ]
        assert [each() for each in alive] == [None] * 3
    finally:
        gc.enable()


def test_a_tensor_whose_method_was_an_operation_is_not_kept():
    class Methods(torch.nn.Module):
        def forward(self, x):
            y = x + 1
            return y.mul(2)

    model = NNsight(Methods())
    gc.disable()
    try:
        with model.trace(X):
            alive = weakref.ref(model.source.y_0.output)
            model.source.y_mul_0.output
        assert alive() is None
    finally:
        gc.enable()


def test_many_traces_leave_no_objects_behind(model, block):
    for _ in range(20):
        with model.trace(X):
            reads(block)
    gc.collect()
    before = len(gc.get_objects())
    gc.disable()
    try:
        for _ in range(300):
            with model.trace(X):
                reads(block)
        assert len(gc.get_objects()) - before < 100
    finally:
        gc.enable()


def test_the_model_is_freed_by_reference_count():
    model = NNsight(Net())
    alive = weakref.ref(model._module)
    gc.disable()
    try:
        with model.trace(X):
            reads(model.blocks[0])
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_a_module_that_is_exchanged_has_operations_of_its_own(model):
    with model.trace(X):
        model.blocks[0].source.self_lin_0.output
    model._module.blocks[0] = Block()
    with model.trace(X):
        assert torch.equal(model.blocks[0].source.self_lin_0.output, model._module.blocks[0].lin(X))


# Forwards of other kinds


class Locals(torch.nn.Module):
    """Hands its arguments on by name."""

    def forward(self, x, factor=2):
        given = {name: value for name, value in locals().items() if name != "self"}
        return self.scaled(**given)

    def scaled(self, x, factor):
        return x * factor


def test_a_forward_that_lists_its_own_names_is_given_no_other():
    model = NNsight(Locals())
    with model.trace(X):
        assert torch.equal(model.source.self_scaled_0.output, X * 2)
        assert model.source is not None


class Generating(torch.nn.Module):
    """Sums what a generator gives."""

    def pieces(self, x):
        for number in range(3):
            piece = x + number
            yield piece

    def forward(self, x):
        return sum(self.pieces(x))


@pytest.mark.xfail(strict=True, reason="a generator's function has returned before its operations run")
def test_the_operations_of_a_generator_are_reached():
    model = NNsight(Generating())
    with model.trace(X):
        pieces = [visit.output for visit in model.source.self_pieces_0.source.piece_0.visits()]
    assert [torch.equal(piece, X + number) for number, piece in enumerate(pieces)] == [True] * 3


class DirectCall(torch.nn.Module):
    """Calls a child's forward without its hooks."""

    def __init__(self):
        super().__init__()
        self.child = Block()

    def forward(self, x):
        return self.child.forward(x)


def test_a_direct_call_of_a_forward_is_a_call_of_its_module():
    model = NNsight(DirectCall())
    with model.trace(X):
        model.child.input
        message = sentence(SourceError, lambda: model.source.self_child_forward_0.source)
        relu = model.child.source.torch_relu_0.output
    assert message == "`model.source.self_child_forward_0` calls a module.\nIts own source is `model.child.source`."
    assert torch.equal(relu, torch.relu(model._module.child.lin(X)))


def closing_over(function):
    class Closing(torch.nn.Module):
        def forward(self, x):
            return function(x)

    return Closing()


def test_a_function_in_a_closure_is_known_beforehand():
    model = NNsight(closing_over(shifted))
    assert list(model.source.function_0.source) == ["moved_0"]
    with model.trace(X):
        assert torch.equal(model.source.function_0.source.moved_0.output, X + 1)


class Shadowing(torch.nn.Module):
    """Has a name in a comprehension that means something else outside."""

    def forward(self, x):
        return [shifted(x) for shifted in (torch.tanh, halved)][1]


def test_what_a_name_means_in_a_comprehension_is_not_taken_from_outside():
    model = NNsight(Shadowing())
    assert repr(model.source.shifted_0.source) == "<model.source.shifted_0.source: known when it is called>"


def test_a_compiled_model_has_operations():
    module = torch.nn.Sequential(Block())
    module.compile(backend="eager")
    model = NNsight(module)
    expected = torch.relu(module[0].lin(X))
    with pytest.warns(UserWarning, match="`model` is compiled"), model.trace(X):
        assert torch.equal(model[0].source.torch_relu_0.output, expected)
    with model.trace(X):
        assert torch.equal(model[0].source.torch_relu_0.output, expected)


def test_the_calls_of_a_function_on_another_thread_are_not_waited_for():
    class Threaded(torch.nn.Module):
        def forward(self, x):
            out = []
            thread = threading.Thread(target=lambda: out.append(shifted(x)))
            thread.start()
            thread.join()
            result = out[0]
            return result

    model = NNsight(Threaded())
    with pytest.raises((OutOfOrderError, NotReachedError)), model.trace(X):
        model.source.shifted_0.output
    with model.trace(X):
        assert torch.equal(model.source.result_0.output, X + 1)


def test_a_rewritten_forward_is_used_only_where_it_is_asked_for(model, block):
    seen = []
    model._module.blocks[0].hooks.append(lambda: seen.append(current_code()))
    with model.trace(X):
        block.output
    with model.trace(X):
        block.source.torch_relu_0.output
    model._module(X)
    original = own_forward(model._module.blocks[0]).__code__
    assert [code is original for code in seen] == [True, False, True]


def current_code():
    """The code of the innermost forward of this file that runs."""
    frame = sys._getframe(1)
    while (frame.f_code.co_name, frame.f_code.co_filename) != ("forward", __file__):
        frame = frame.f_back
    return frame.f_code
