"""Walks through a held run, at random: what comes of them is what plain hooks with the same edits give."""

import copy
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from conftest import SIZES
from hypothesis import HealthCheck, example, given, settings, strategies as st

from nnsight_eager import NNsight
from nnsight_eager.errors import PointError
from nnsight_eager.nested import first_tensor, mapped, tensors
from nnsight_eager.paths import spelled


class Block(torch.nn.Module):
    """Buffers that it updates, random numbers, a module of all blocks, one that changes its input, and an object they share."""

    def __init__(self, act):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(6)
        self.up = torch.nn.Linear(6, 6)
        self.act = act  # the same module in every block
        self.drop = torch.nn.Dropout(0.3)
        self.relu = torch.nn.ReLU(inplace=True)

    def forward(self, x, log):
        y = self.relu(self.drop(self.act(self.up(self.norm(x)))))
        log.append(float(y.detach().sum()))  # into an object that all blocks share
        return x + torch.nn.functional.dropout(y, 0.2, self.training), log


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        act = torch.nn.Tanh()
        self.embed = torch.nn.Linear(4, 6)
        self.same = torch.nn.Identity()
        self.blocks = torch.nn.ModuleList(Block(act) for _ in range(4))
        self.head = torch.nn.Linear(6, 3)

    def forward(self, x):
        x, log = self.same(self.embed(x)), []
        for number, block in enumerate(self.blocks):
            x, log = block(x, log)
            if number == 1:
                x += 1  # in place, on what a block has given
        return self.head(x), log


class Program(NamedTuple):
    """A model call that can be made plainly and held by hand."""

    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mode: Any = nullcontext
    skipped: str = "norm relu same"  # the modules that can be left out, by their last name

    def plainly(self):
        function = self.kwargs.get("fn")
        kwargs = {name: value for name, value in self.kwargs.items() if name != "fn"}
        return (getattr(self.module, function) if function else self.module)(*mapped(self.args, torch.clone), **kwargs)

    def held(self, keep):
        return NNsight(self.module).trace(*self.args, **self.kwargs).start(keep=keep)


def blocks(train, mode=nullcontext, grad=True):
    torch.manual_seed(1)
    return Program(Model().train(train).requires_grad_(grad), (torch.randn(5, 4),), {}, mode)


@cache
def language_model(kind):
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=40, bos_token_id=0, eos_token_id=0, pad_token_id=0, **SIZES[kind]
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def language(kind, train, mode=nullcontext, **kwargs):
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    module = language_model(kind).train(train)
    return Program(module, (ids,), {"attention_mask": torch.ones_like(ids), **kwargs}, mode, "mlp ln_1 input_layernorm")


GENERATE = {"fn": "generate", "max_new_tokens": 3, "do_sample": True}
PROGRAMS = {
    "training": lambda: blocks(True),
    "training, frozen": lambda: blocks(True, grad=False),
    "evaluation": lambda: blocks(False),
    "no_grad": lambda: blocks(True, torch.no_grad),
    "inference_mode": lambda: blocks(True, torch.inference_mode),
    "GPT-2 with dropout and a cache": lambda: language("gpt2", True, use_cache=True),
    "Llama with a cache": lambda: language("llama", False, torch.no_grad, use_cache=True),
    "GPT-2 generates": lambda: language("gpt2", False, **GENERATE),
    "Llama generates": lambda: language("llama", False, **GENERATE),
}


def plain(program, edits):
    """The places the model comes by, what it gives, and its buffers afterwards, with `edits` made by plain means."""
    places, visits, step = [], {}, [0]
    handles, modules = [], dict(program.module.named_modules())

    def come_by(path, kind):
        visits[step[0], path, kind] = visits.get((step[0], path, kind), 0) + 1
        places.append((path, kind, step[0], visits[step[0], path, kind]))
        return edits.get(places[-1], ())

    def before(path, module, args, kwargs):
        for edit in come_by(path, "input"):
            if edit != "skip":
                args, kwargs = with_first((args, kwargs), edit)
        return args, kwargs

    def instead(path, module, forward, args, kwargs):
        return (
            leaving_out(module, first(args, kwargs)[1], args)
            if "skip" in edits.get(places[-1], ())
            else forward(*args, **kwargs)
        )

    def behind(path, module, args, value):
        for edit in come_by(path, "output"):
            old = first_tensor(value)
            new = changed(old, edit)
            if new is not old:
                value = with_tensor(value, old, new)
        if not path:
            step[0] += 1
        return value

    for path, module in modules.items():
        if not isinstance(module, torch.nn.ModuleList):
            forward = module.forward
            handles.append(module.register_forward_pre_hook(lambda m, a, k, p=path: before(p, m, a, k), with_kwargs=True))
            handles.append(module.register_forward_hook(lambda m, a, out, p=path: behind(p, m, a, out)))
            if path.rpartition(".")[2] in program.skipped.split():
                module.forward = lambda *a, p=path, m=module, f=forward, **k: instead(p, m, f, a, k)
    saved = [buffer.clone() for buffer in program.module.buffers()]
    try:
        with torch.random.fork_rng(), program.mode():
            torch.manual_seed(2)
            result = program.plainly()
        return places, result, [buffer.clone() for buffer in program.module.buffers()]
    finally:
        for handle in handles:
            handle.remove()
        for module in modules.values():
            vars(module).pop("forward", None)
        for buffer, value in zip(program.module.buffers(), saved, strict=True):
            buffer.data.copy_(value)


def with_tensor(value, old, new):
    """A module's value, with another tensor in the place of its first."""
    if isinstance(value, dict):  # a model output
        return type(value)(**{name: new if each is old else each for name, each in value.items()})
    return (new, *value[1:]) if isinstance(value, tuple) else new


def first(args, kwargs):
    """The first argument, with its place."""
    name = 0 if args else next(iter(kwargs))
    return name, (args[0] if args else kwargs[name])


def with_first(inputs, edit):
    args, kwargs = inputs
    name, old = first(args, kwargs)
    new = changed(old, edit)
    return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, name: new})


def changed(tensor, edit):
    if edit == "halve":
        return tensor * 0.5
    if edit == "noise":
        return tensor + torch.randn(tensor.shape)
    return tensor.mul_(0.9) if not (tensor.is_leaf and tensor.requires_grad) else tensor * 0.9


def leaving_out(module, tensor, args):
    """What stands in for the module's output."""
    return (tensor * 0.25, *args[1:]) if isinstance(module, Block) else tensor * 0.25


def as_in_receipts(edited):
    """The points, with their step, that were edited at each place: at its input a module may be skipped after an edit."""
    for (path, kind, step, _), edits in edited.items():
        for edit in edits:
            yield spelled(path, "skip" if edit == "skip" else kind), step


class Walk:
    """A held run, and beside it the edits that are in force."""

    def __init__(self, program, twin, run, edits):
        self.program, self.twin, self.run, self.edits = program, twin, run, edits
        self.paths = {id(module): path for path, module in program.module.named_modules()}

    @property
    def at(self):
        visit = self.run._run.at
        return None if visit is None else (self.paths[id(visit.module)], visit.kind, visit.step, visit.times)

    def places(self):
        return plain(self.twin, self.edits)[0]

    def edit(self, edit):
        visit, place = self.run._run.at, self.at
        if place is None or (visit.kind == "input" and not (visit.args or visit.kwargs)) or "skip" in self.edits.get(place, ()):
            return
        envoy = self.run.model[place[0]] if place[0] else self.run.model
        value = envoy.input if visit.kind == "input" else first_tensor(visit.value)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return
        if edit == "skip":
            if visit.kind != "input" or place[0].rpartition(".")[2] not in self.program.skipped.split():
                return
            envoy.skip(leaving_out(envoy._module, value, visit.args))
        elif edit == "in place":
            new = changed(value, edit)
            if new is not value:
                self.put(envoy, visit.kind, new)
        else:
            self.put(envoy, visit.kind, changed(value, edit))
        self.edits = {**self.edits, place: (*self.edits.get(place, ()), edit)}

    @staticmethod
    def put(envoy, kind, value):
        if kind == "input":
            envoy.input = value
        else:
            envoy.hidden = value

    def back_to(self, number):
        places, at = self.places(), self.at
        path, kind, *_ = places[number % (places.index(at) + 1 if at else len(places))]
        before = self.run._run
        try:
            self.run.back_to(path if path else self.run.model, kind)
        except PointError:
            assert self.run._run is before
            assert self.at == at
            return
        behind = places[places.index(self.at) :]
        self.edits = {place: edits for place, edits in self.edits.items() if place not in behind}

    def restart(self, _):
        self.run.restart()
        self.edits = {}

    def to(self, number):
        places = self.places()
        path, kind, *_ = places[number % len(places)]
        try:
            self.run.to(path if path else self.run.model, kind)
        except PointError:
            assert self.run._run.open or self.run._run.finished

    def fork(self):
        return Walk(self.program, self.twin, self.run.fork(), dict(self.edits))


MOVES = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.sampled_from(["over", "out", "fork", "restart"]), st.none()),
    st.tuples(st.sampled_from(["to", "back_to"]), st.integers(0, 200)),
    st.tuples(st.just("edit"), st.sampled_from(["halve", "noise", "in place", "skip"])),
)


@pytest.mark.parametrize("name", PROGRAMS)
@settings(max_examples=8, deadline=None, suppress_health_check=[*HealthCheck])
@given(keep=st.booleans(), moves=st.lists(st.tuples(st.integers(0, 2), MOVES), min_size=3, max_size=12))
@example(keep=False, moves=[(0, ("step", 1)), (0, ("step", 2)), (0, ("edit", "halve")), (0, ("edit", "skip"))])
@example(keep=True, moves=[(0, ("step", 1)), (0, ("step", 2)), (0, ("edit", "in place")), (0, ("edit", "skip"))])
def test_a_walk_comes_to_what_plain_hooks_give(one_torch_thread, name, keep, moves):
    program = PROGRAMS[name]()
    twin = copy.deepcopy(program)  # what is done plainly
    before = [{key: copy.copy(value) for key, value in vars(each).items()} for each in program.module.modules()]
    torch.manual_seed(2)
    with program.mode():
        walks = [Walk(program, twin, program.held(keep), {})]
        for which, (move, how) in moves:
            walk = walks[which % len(walks)]
            if not walk.run._run.open:
                continue
            if move == "fork":
                if len(walks) < 3 and walk.at is not None:
                    walks.append(walk.fork())
            elif how == "noise" and len(walks) > 1:
                continue  # random numbers drawn by hand belong to whichever run goes on next
            elif move in ("edit", "back_to", "to", "restart"):
                getattr(walk, move)(how)
            else:
                getattr(walk.run, move)(*([how] if how else []))
        results = [walk.run.finish() for walk in walks]
    assert [dict(vars(each)) for each in program.module.modules()] == before
    for walk, result in zip(walks, results, strict=True):
        assert {(each.point, each.step) for each in walk.run.edits} == {*as_in_receipts(walk.edits)}
        _, expected, buffers = plain(twin, walk.edits)
        assert all(map(torch.equal, tensors(result), tensors(expected)))
        assert not isinstance(result, tuple) or result[1] == expected[1]  # the list that the blocks have written into
        if len(walks) == 1:
            assert all(map(torch.equal, program.module.buffers(), buffers))
