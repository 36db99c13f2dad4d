"""Models that torch compiles, scripts or fuses: what is asked for is seen, or refused; never silently unseen."""

import functools
import subprocess
import sys
import warnings

import pytest
import torch
from left_behind import everything

from nnsight_eager import NNsight, NotReachedError

NOTICE = "is compiled. In a trace it runs eagerly, as it is written; outside of one nothing changes."


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(8, 8)
        self.block = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())

    def forward(self, x):
        return self.block(self.first(x).sin())


@pytest.fixture
def x():
    return torch.randn(2, 5, 8)


COMPILED = {
    "wrapped": lambda module: torch.compile(module, backend="eager"),
    "in place": lambda module: module.compile(backend="eager"),
    "a child in place": lambda module: module.block.compile(backend="eager"),
    "a child wrapped": lambda module: setattr(module, "block", torch.compile(module.block, backend="eager")),
    "a child's forward": lambda module: setattr(module.block, "forward", torch.compile(module.block.forward, backend="eager")),
}


@pytest.mark.parametrize(
    ("how", "when"),
    [*((how, "before") for how in COMPILED), *((how, "after a trace") for how in COMPILED if "wrapped" not in how)],
)
def test_a_compiled_model_runs_eagerly_in_a_trace_and_says_so_once(x, how, when):
    module, plain = Model(), Model()
    model = NNsight(module) if when == "after a trace" else None
    if model is not None:
        model.trace(x).result
    compiled = COMPILED[how](module)
    callable_ = module if compiled is None else compiled
    with torch.no_grad():
        frames = torch._dynamo.utils.counters["frames"]
        want = callable_(x)
        with warnings.catch_warnings(record=True) as noticed:
            warnings.simplefilter("always")
            model = model or NNsight(callable_)
            before, counted = everything(model), frames["total"]
            for _ in range(3):
                with model.trace(x) as tracer:
                    inner = model.block[0].output
                    model.block[0].output = inner * 0 - 1
                    outer = model.block.output
                assert torch.equal(inner, plain.block[0](plain.first(x).sin()))
                assert not outer.any()
                assert not tracer.result.any()
        assert [str(each.message).split("`", 2)[2].strip() for each in noticed] == [NOTICE]
        assert noticed[0].filename == __file__
        assert frames["total"] == counted, "the compiler was at work in a trace"
        assert everything(model) == before
        assert torch.equal(callable_(x), want)
        assert frames["total"] == counted, "what was compiled is compiled anew after a trace"


def test_two_runs_that_overlap_leave_a_compiled_module_compiled(x):
    module = Model()
    module.compile(backend="eager")
    call, model = module._compiled_call_impl, NNsight(module)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = model.trace(x), model.trace(x * 2)
        first.__enter__(), second.__enter__()
        seen = first.model.block[0].output, second.model.block[0].output
        first.__exit__(None, None, None)
        assert module._compiled_call_impl is None
        assert torch.equal(second.model.block.output, seen[1].relu())
        second.__exit__(None, None, None)
    assert module._compiled_call_impl is call


@pytest.mark.parametrize("inside", [True, False])
def test_a_compiled_function_that_runs_the_model_is_run_as_it_is_written(x, inside):
    module = Model()
    model = NNsight(module)
    function = torch.compile(lambda x: module(x) * 2, backend="eager")
    with torch.no_grad():
        want = module(x) * 2
        with model.trace(x, fn=function) as tracer:
            seen = model.block[0].output if inside else model.output
    assert torch.equal(seen, module.block[0](module.first(x).sin()) if inside else want / 2)
    assert torch.equal(tracer.result, want)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_inside_a_scripted_module_nothing_is_reached_and_that_is_said(x):
    module = Model()
    want = module(x)
    module.block = torch.jit.trace(module.block, x)
    model = NNsight(module)
    for _ in range(2):
        with pytest.raises(NotReachedError), model.trace(x):
            model.block["0"].output
        with model.trace(x):
            assert torch.equal(model.block.output, want)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_two_runs_that_overlap_read_a_traced_module(x):
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.jit.trace(torch.nn.Linear(8, 8), x))
    model = NNsight(module)
    for _ in range(2):
        with model.trace(x) as outer:
            with model.trace(x * 2) as inner:
                assert torch.equal(inner.model[1].output, module(x * 2))
            assert torch.equal(outer.model[1].output, module(x))


class Attends(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def test_the_fast_path_of_attention_is_read_and_its_projection_which_is_never_called_is_not_reached(x):
    module = Attends().eval()
    model, calls = NNsight(module), []
    module.attention.out_proj.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        want = module(x)
        for _ in range(2):
            with model.trace(x) as tracer:
                assert torch.equal(model.attention.output[0], want)
                model.attention.output = (want * 0, None)
            assert not tracer.result.any()
            with pytest.raises(NotReachedError), model.trace(x):
                model.attention.out_proj.output
    assert calls == [], "torch does not call it either: it takes the weights"


def encoder():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@pytest.mark.parametrize("path", ["layers.0.linear1", "layers.1.self_attn", "layers.1.norm2", "layers.0", "layers.1.dropout"])
def test_a_point_inside_the_fast_path_of_an_encoder_layer_is_what_a_hook_sees(x, path):
    module, seen = encoder(), []
    model = NNsight(module)

    def zero(_, args, output):
        seen.append(output)
        return (output[0] * 0, None) if isinstance(output, tuple) else output * 0

    with torch.no_grad():
        plain = module(x)
        handle = module.get_submodule(path).register_forward_hook(zero)
        want = module(x)
        handle.remove()
        before = everything(model)
        for _ in range(2):
            with model.trace(x) as tracer:
                output = model[path].output
                model[path].output = (output[0] * 0, None) if isinstance(output, tuple) else output * 0
            hidden, hooked = (each[0] if isinstance(each, tuple) else each for each in (output, seen[0]))
            assert torch.allclose(hidden, hooked, atol=1e-6)
            assert torch.allclose(tracer.result, want, atol=1e-6)
            with model.trace(x) as tracer:
                pass
            assert torch.equal(tracer.result, plain), "where nobody waits inside, the fast path is taken"
            with model.trace(x) as tracer:
                cache = tracer.cache(path)
            kept = cache[path].hidden
            assert torch.allclose(kept, hooked, atol=1e-6)
        assert everything(model) == before


def test_a_point_inside_the_fast_path_is_seen_by_each_of_two_runs_whichever_ends_first(x):
    module = encoder()
    model, layer = NNsight(module), module.layers[1]
    with torch.no_grad():
        before = everything(model)
        for ends_first in (0, 1):
            runs = [model.trace(x), model.trace(x * 2)]
            for run in runs:
                run.__enter__()
                run.model.layers[1].input  # both listen at the layer
            runs[ends_first].__exit__(None, None, None)
            runs[1 - ends_first].model.layers[1].linear1.output *= 0
            unread = runs[1 - ends_first].model.layers[1].norm2.input
            runs[1 - ends_first].__exit__(None, None, None)
            hidden = module.layers[0](x * 2 if ends_first == 0 else x)
            hidden = layer.norm1(hidden + layer._sa_block(hidden, None, None))
            assert torch.allclose(unread, hidden + layer.linear2(torch.zeros(2, 5, 16)), atol=1e-6)
            assert everything(model) == before


def test_operations_in_the_source_of_an_encoder_layer_are_met_beside_points_inside_it(x):
    module = encoder()
    model, layer = NNsight(module), module.layers[0]
    with torch.no_grad():
        with model.trace(x):
            attended = model.layers[0].source.self__sa_block_1.output
            inner = model.layers[0].linear1.output
        want = layer._sa_block(x, None, None)
        assert torch.allclose(attended, want, atol=1e-6)
        assert torch.allclose(inner, layer.linear1(layer.norm1(x + want)), atol=1e-6)


class CompiledInItsClass(Model):
    @torch.compile(backend="eager")
    def forward(self, x):
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:.*is compiled:UserWarning")
def test_a_forward_that_its_class_compiles_runs_eagerly_in_each_of_two_runs(x):
    model = NNsight(torch.nn.Sequential(CompiledInItsClass(), torch.nn.Linear(8, 8)))
    plain = Model()
    with torch.no_grad():
        frames = torch._dynamo.utils.counters["frames"]["total"]
        for _ in range(2):
            with model.trace(x) as outer:
                assert torch.equal(model[0].first.output, plain.first(x))
                with model.trace(x * 2) as inner:
                    assert torch.equal(inner.model[0].output, plain(x * 2))
                assert torch.equal(outer.model[0].output, plain(x))
    assert torch._dynamo.utils.counters["frames"]["total"] == frames


def tripled(forward):
    @functools.wraps(forward)
    def wrapper(*args):
        return 3 * forward(*args)

    return wrapper


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda forward: tripled(torch.compile(forward, backend="eager")),
        lambda forward: torch._dynamo.disable(tripled(torch.compile(forward, backend="eager"))),
        lambda forward: torch._dynamo.disable(tripled(forward)),
    ],
    ids=["around a compiled forward", "kept from the compiler around one", "kept from the compiler"],
)
def test_what_wraps_a_forward_runs_in_a_trace_and_is_not_taken_for_a_compiled_one(x, wrapped):
    module, plain = Model(), Model()
    module.block.forward = wrapped(module.block.forward)
    model = NNsight(module)
    with torch.no_grad():
        for _ in range(2):
            with model.trace(x):
                assert torch.equal(model.block.output, 3 * plain(x))


def test_a_compiled_function_that_calls_modules_does_not_compile_what_listens_in_them(x):
    module, plain = Model(), Model()
    forward = module.forward
    compiled = torch.compile(lambda x: forward(x), backend="eager")
    module.forward = lambda x: compiled(x)
    model = NNsight(module)
    with torch.no_grad():
        for _ in range(2):
            with model.trace(x) as tracer:  # the compiler warns of what it meets in the package, and cannot compile
                inner = model.block[0].output
                model.block[0].output = inner * 0 - 1
            assert torch.equal(inner, plain.block[0](plain.first(x).sin()))
            assert not tracer.result.any()
        assert torch.equal(module(x), plain(x))


def test_traces_go_on_while_another_thread_imports_the_compiler():
    script = """if True:
        import threading, torch
        from nnsight_eager import NNsight
        model, x = NNsight(torch.nn.Sequential(torch.nn.Linear(2, 2))), torch.ones(1, 2)
        importing = threading.Thread(target=lambda: __import__("torch._dynamo"))
        importing.start()
        while importing.is_alive():
            with model.trace(x):
                pass
        print("done")"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr
