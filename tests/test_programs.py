"""Any program of reads, edits, skips and stops gives what plain hooks give: values, gradients and errors."""

import contextlib

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings, strategies as st

from nnsight_eager import NNsight
from nnsight_eager.errors import ChangedInPlaceError, NotReachedError, OutOfOrderError

WIDTH = 3


class Sine(torch.nn.Module):
    def forward(self, x):
        return x.sin()


class Residual(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Twice(torch.nn.Module):
    """Calls one module two times."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(self.inner(x))


class Root(torch.nn.Module):
    """The tree, a module that is used wherever the tree says so, and one that never runs."""

    def __init__(self, tree):
        super().__init__()
        self.shared = torch.nn.Linear(WIDTH, WIDTH)
        self.unused = torch.nn.Linear(WIDTH, WIDTH)
        self.tree = self.grown(tree)

    def grown(self, tree):
        match tree:
            case "linear":
                return torch.nn.Linear(WIDTH, WIDTH)
            case "sine":
                return Sine()
            case "shared":
                return self.shared
            case "residual", inner:
                return Residual(self.grown(inner))
            case "twice", inner:
                return Twice(self.grown(inner))
            case "sequential", parts:
                return torch.nn.Sequential(*map(self.grown, parts))

    def forward(self, x):
        return self.tree(x)


trees = st.recursive(
    st.sampled_from(["linear", "sine", "shared"]),
    lambda inner: st.one_of(
        st.tuples(st.just("residual"), inner),
        st.tuples(st.just("twice"), inner),
        st.tuples(st.just("sequential"), st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=6,
)
# What to do at the first event, the second, ...; an event is that the model reaches an input or an output.
actions = st.lists(
    st.sampled_from([None, None, "read", "read inputs", "replace", "replace inputs", "in place", "skip", "stop"]), max_size=40
)


def changed(value):
    return value * 1.5 + 0.25


class StopError(Exception):
    """How plain hooks stop a forward."""


class ByHand:
    """The program done by plain hooks: what it saw, what came of it, and every event on the way."""

    def __init__(self, root, plan, x):
        self.plan = iter(plan)
        self.events, self.program, self.seen, self.skipped = [], [], [], []
        self.visits, self.skip_with = {}, {}
        self.result = None
        with contextlib.ExitStack() as hooks, contextlib.suppress(StopError):
            for module in root.modules():
                hooks.callback(module.register_forward_pre_hook(self.before).remove)
                hooks.callback(module.register_forward_hook(self.after).remove)
                module.forward = self.unless_skipped(module)
                hooks.callback(module.__dict__.pop, "forward")
            self.result = root(x)

    def unless_skipped(self, module):
        def forward(x):
            return self.skip_with.pop(module) if module in self.skip_with else type(module).forward(module, x)

        return forward

    def before(self, module, args):
        self.visits[module] = self.visits.get(module, 0) + 1
        value, action = self.act(module, "input", args[0])
        if action == "skip":
            self.skip_with[module] = value
            self.skipped.append(module)
            return None
        return (value,)

    def after(self, module, args, output):
        return self.act(module, "output", output)[0]

    def act(self, module, kind, value):
        """Do what the plan has for this event."""
        event = (module, kind, self.visits[module])
        self.events.append(event)
        action = next(self.plan, None)
        if action is not None and kind == "output":
            action = {"read inputs": "read", "replace inputs": "replace", "skip": "read"}.get(action, action)
        if action is not None:
            self.program.append((event, action))
            if action == "in place":
                value = value.mul_(0.75)
            self.seen.append(value.detach().clone())
            if action in ("replace", "replace inputs", "skip"):
                value = changed(value)
            if action == "stop":
                raise StopError
        return value, action


class ByTrace:
    """The same program as the body of a trace."""

    def __init__(self, model, by_hand, x, last=None):
        root = model._module
        names = {module: name for name, module in root.named_modules()}
        self.envoys = {module: model[name] if name else model for module, name in names.items()}
        self.events, self.at, self.seen, self.result = by_hand.events, -1, [], None
        with model.trace(x) as tracer:
            for event, action in by_hand.program:
                self.act(tracer, self.reached(event), event[1], action)
            if last is not None:
                last(self)
        if by_hand.result is not None:
            self.result = tracer.result

    def reached(self, event):
        """The envoy that means the event: itself at its module's first visit, else `next()` as often as it takes."""
        module, kind, visit = event
        envoy, before, self.at = self.envoys[module], self.at, self.events.index(event)
        if visit > 1:
            for passed in self.events[before + 1 : self.at + 1]:
                if passed[:2] == (module, kind):
                    envoy = self.envoys[module].next()
                    getattr(envoy, kind)
        return envoy

    def act(self, tracer, envoy, kind, action):
        value = envoy.inputs[0][0] if action.endswith("inputs") else getattr(envoy, kind)
        if action == "in place":
            value.mul_(0.75)
        self.seen.append(value.detach().clone())
        if action == "replace":
            setattr(envoy, kind, changed(value))
        elif action == "replace inputs":
            envoy.inputs = ((changed(value),), {})
        elif action == "skip":
            envoy.skip(changed(value))
        elif action == "stop":
            tracer.stop()


def gradients(root, leaf, result):
    """The gradients of the result to the leaf and to every weight."""
    return torch.autograd.grad(result.square().sum(), [leaf, *root.parameters()], allow_unused=True, retain_graph=True)


def same(ours, theirs):
    return all((a is b is None) or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def grown(tree):
    torch.manual_seed(0)
    return Root(tree), torch.randn(2, WIDTH, requires_grad=True)


any_program = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@any_program
@given(trees, actions)
@example(("twice", "linear"), [*[None] * 5, "read", "read"])  # out of a module used twice, to the end of the one around it
def test_a_program_gives_what_plain_hooks_give(tree, plan):
    root, leaf = grown(tree)
    by_hand, model = ByHand(root, plan, leaf * 1), NNsight(root)
    for _ in range(2):  # the first run learns the order of the modules, later ones use it
        by_trace = ByTrace(model, by_hand, leaf * 1)
        assert same(by_trace.seen, by_hand.seen)
        if by_hand.result is not None:
            assert torch.equal(by_trace.result, by_hand.result)
            assert same(gradients(root, leaf, by_trace.result), gradients(root, leaf, by_hand.result))
        assert not any("forward" in module.__dict__ or module._forward_hooks for module in root.modules())


def passed(by_hand):
    """The points whose first visit lies before the last event of the program, and which it is not paused at."""
    last = by_hand.program[-1][0]
    before = by_hand.events[: by_hand.events.index(last)]
    return [
        (module, kind)
        for module, kind, visit in before
        if visit == 1 and (module, kind) != last[:2] and not (module is last[0] and kind == "input")
    ]


@any_program
@given(trees, actions, st.integers(0, 100))
@example(("sequential", ["shared", "linear", "shared"]), [*[None] * 5, "read"], 3)  # between two visits
@example(("twice", ("residual", "linear")), [None, None, "skip", None, None, "read"], 0)  # skipped once, then run
@example(("twice", ("sequential", ["linear", "linear"])), [*[None] * 8, "skip"], 16)  # run once, then inside what is skipped
def test_a_point_that_has_passed_is_an_error_at_its_line_and_the_run_goes_on(tree, plan, which):
    root, leaf = grown(tree)
    by_hand, model = ByHand(root, [action for action in plan if action != "stop"], leaf * 1), NNsight(root)
    assume(by_hand.program)
    candidates = passed(by_hand)
    assume(candidates)
    module, kind = candidates[which % len(candidates)]

    def last(by_trace):
        with pytest.raises(OutOfOrderError):
            getattr(by_trace.envoys[module], kind)

    for _ in range(2):
        by_trace = ByTrace(model, by_hand, leaf * 1, last)
        assert torch.equal(by_trace.result, by_hand.result)
        assert same(gradients(root, leaf, by_trace.result), gradients(root, leaf, by_hand.result))


@any_program
@given(trees, actions)
def test_a_module_that_does_not_run_is_an_error_of_its_own(tree, plan):
    root, leaf = grown(tree)
    by_hand, model = ByHand(root, [action for action in plan if action != "stop"], leaf * 1), NNsight(root)
    ran = {module for module, _, _ in by_hand.events}

    def last(by_trace):
        for module in root.modules():
            if module not in ran:
                with pytest.raises(NotReachedError):
                    _ = by_trace.envoys[module].output

    for _ in range(2):
        assert torch.equal(ByTrace(model, by_hand, leaf * 1, last).result, by_hand.result)


def test_a_point_that_has_passed_is_refused_before_the_model_goes_on():
    model = NNsight(torch.nn.Sequential(Sine(), Sine(), Sine()))
    for _ in range(2):
        with model.trace(torch.zeros(2, WIDTH)):
            first, _ = model[0].output, model[1].output
            with pytest.raises(OutOfOrderError):
                _ = model[0].output
            assert torch.equal(model[2].output, first.sin().sin())


class AddsInPlace(torch.nn.Module):
    def forward(self, x):
        return x.add_(1)


def test_an_input_that_was_replaced_is_still_read_at_the_output():
    model, x = NNsight(torch.nn.Sequential(Sine())), torch.zeros(2, WIDTH)
    x.add_(1)  # an older version than the replacement's
    with model.trace(x):
        model[0].input = new = torch.full((2, WIDTH), 2.0)
        _ = model[0].output
        assert model[0].input is new


def test_an_input_that_was_replaced_and_then_changed_in_place_by_the_module_is_refused():
    model, x = NNsight(torch.nn.Sequential(AddsInPlace())), torch.zeros(2, WIDTH)
    x.add_(1)
    with model.trace(x):
        model[0].input = torch.full((2, WIDTH), 2.0)
        _ = model[0].output
        with pytest.raises(ChangedInPlaceError):
            _ = model[0].input
