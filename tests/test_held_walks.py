"""Walks through a held run, at random: what comes of them is what plain hooks with the same edits give."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from small_models import X4, Stack

from nnsight_eager import NNsight, OutOfOrderError
from nnsight_eager.nested import first_tensor


class Block(torch.nn.Module):
    def __init__(self, act):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(6)
        self.up = torch.nn.Linear(6, 6)
        self.act = act  # the same module in every block
        self.drop = torch.nn.Dropout(0.3)

    def forward(self, x, log):
        y = self.drop(self.act(self.up(self.norm(x))))
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


def made(train, grad):
    torch.manual_seed(1)
    model = Model().train(train)
    return model.requires_grad_(grad), torch.randn(5, 4)


def plain(train, grad, edits):
    """The places the model comes by, what it gives, and its buffers afterwards, with `edits` made by hooks."""
    model, x = made(train, grad)
    places, visits = [], {}

    def come_by(path, module, kind, value):
        visits[path, kind] = visits.get((path, kind), 0) + 1
        places.append((path, kind, visits[path, kind]))
        return edited(value, edits.get(places[-1], ()))

    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList):
            module.register_forward_pre_hook(lambda m, args, p=path: (come_by(p, m, "input", args[0]), *args[1:]))
            module.register_forward_hook(lambda m, args, out, p=path: come_by(p, m, "output", out))
    torch.manual_seed(2)
    return places, model(x), [buffer.clone() for buffer in model.buffers()]


def edited(value, edits):
    for edit in edits:
        old = first_tensor(value)
        new = changed(old, edit)
        if new is not old:
            value = (new, *value[1:]) if isinstance(value, tuple) else new
    return value


def changed(tensor, edit):
    if edit == "halve":
        return tensor * 0.5
    if edit == "noise":
        return tensor + torch.randn(tensor.shape)
    return tensor.mul_(0.9) if not (tensor.is_leaf and tensor.requires_grad) else tensor * 0.9


class Walk:
    """A held run, and beside it the edits that are in force."""

    def __init__(self, places, run, edits):
        self.places, self.run, self.edits = places, run, edits

    @property
    def at(self):
        visit = self.run._run.at
        path = next(path for path, module in self.run._tree.root.named_modules() if module is visit.module)
        return path, visit.kind, visit.times

    def edit(self, edit):
        envoy = self.run.model[self.at[0]] if self.at[0] else self.run.model
        if self.at[1] == "input":
            new = changed(envoy.input, edit)
            if edit != "in place":
                envoy.input = new
        else:
            new = changed(envoy.hidden, edit)
            if edit != "in place":
                envoy.hidden = new
        self.edits = {**self.edits, self.at: (*self.edits.get(self.at, ()), edit)}

    def back_to(self, number):
        here = self.places.index(self.at)
        path, kind, _ = self.places[number % (here + 1)]
        self.run.back_to(path, kind) if path else self.run.back_to(self.run.model, kind)
        behind = {*self.places[self.places.index(self.at) :]}
        self.edits = {place: edits for place, edits in self.edits.items() if place not in behind}

    def to(self, number):
        path, kind, _ = self.places[number % len(self.places)]
        try:
            self.run.to(path if path else self.run.model, kind)
        except OutOfOrderError:
            assert self.run._run.open

    def fork(self):
        return Walk(self.places, self.run.fork(), dict(self.edits))


MOVES = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.sampled_from(["over", "out", "fork"]), st.none()),
    st.tuples(st.sampled_from(["to", "back_to"]), st.integers(0, 60)),
    st.tuples(st.just("edit"), st.sampled_from(["halve", "noise", "in place"])),
)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keep=st.booleans(), moves=st.lists(st.tuples(st.integers(0, 2), MOVES), min_size=1, max_size=12))
def test_a_walk_comes_to_what_plain_hooks_give(train, grad, keep, moves):
    places, *_ = plain(train, grad, {})
    module, x = made(train, grad)
    before = [dict(vars(each)) for each in module.modules()]
    torch.manual_seed(2)
    walks = [Walk(places, NNsight(module).trace(x).start(keep=keep), {})]
    for which, (move, how) in moves:
        walk = walks[which % len(walks)]
        if not walk.run._run.open:
            continue
        if move == "fork":
            if len(walks) < 3:
                walks.append(walk.fork())
        elif how == "noise" and len(walks) > 1:
            continue  # random numbers drawn by hand belong to whichever run goes on next
        elif move in ("edit", "back_to", "to"):
            getattr(walk, move)(how)
        else:
            getattr(walk.run, move)(*([how] if how else []))
    results = [walk.run.finish() for walk in walks]
    for walk, result in zip(walks, results, strict=True):
        _, expected, buffers = plain(train, grad, walk.edits)
        assert torch.equal(result[0], expected[0])
        assert result[1] == expected[1]
        if len(walks) == 1:
            assert all(map(torch.equal, module.buffers(), buffers))
    assert [dict(vars(each)) for each in module.modules()] == before


def test_going_back_and_forking_keep_the_receipt_of_what_is_not_computed_again():
    module = Stack()
    run = NNsight(module).trace(X4).start()
    lin = run.model.h[0].lin
    run.to(lin)
    lin.output = lin.output * 2
    run.to("h.2")
    for where in (("h.1",), ("h.1.lin", "input")):
        run.back_to(*where)
        assert [(each.point, each.size) for each in run.edits] == [("model.h[0].lin.output", 1.0)]
    other = run.fork()
    assert [each.point for each in other.edits] == ["model.h[0].lin.output"]
    result = run.finish()
    assert torch.equal(result, other.finish())
    run.restart()
    assert not run.edits
    run.close()
    module.h[0].lin.register_forward_hook(lambda *_: _[-1] * 2)
    assert torch.equal(result, module(X4))
