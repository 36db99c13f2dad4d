"""A fault at a random moment of a random program, and what has to hold after it.

    subject = net()
    program = Program(subject, random.Random("0:17"))
    program.broken()         # a sentence for each thing that does not hold; none where all is well

A program reads, edits, skips and stops on a small model, in one of the forms a user may write it in. Something happens on the
way: an error is raised by the body, the forward pass, a watcher, an edit or a hook of the user's, or a trace that was left
behind is collected there. What a program sees is compared with plain hooks.
"""

import contextlib
import gc
import random
import warnings
import weakref

import torch
from greenlet import greenlet
from left_behind import everything
from subjects import ByHand, Event, changed, nothing
from test_interrupts import interrupted_at

from nnsight_eager.current import _entered
from nnsight_eager.run import Run

IDLE = {"Stack._work", "Stack.__init__.<locals>.<lambda>"}
PLACES = ["body", "forward", "watcher", "edit", "hook", "a line of ours"]
KINDS = ["exception", "Ctrl-C", "no memory", "torch error", "collected trace", "dropped trace"]
ACTIONS = ["read", "read", "replace", "in place", "skip"]
AROUND = {
    "nothing": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


class InjectedError(Exception):
    """What a fault raises."""


class DroppedError(Exception):
    """Leaves the body of a trace that is to be dropped, outside of its block."""


class Fault:
    """One thing that happens, `after` so many moments at its `place`."""

    def __init__(self, place="nowhere", kind="", after=0, collect=None):
        self.place, self.kind, self.after, self.collect = place, kind, after, collect
        self.happened, self.error = False, None

    def moment(self, place):
        """Something might happen now."""
        if self.happened or place != self.place:
            return
        self.after -= 1
        if self.after < 0:
            self.happened = True
            self.happen()

    def happen(self):
        match self.kind:
            case "collected trace":
                self.collect()
                return
            case "torch error":
                try:
                    torch.ones(2, 3) @ torch.ones(4, 5)
                except RuntimeError as error:
                    self.error = error
            case kind:
                raises = {"Ctrl-C": KeyboardInterrupt, "no memory": MemoryError, "dropped trace": DroppedError}
                self.error = raises.get(kind, InjectedError)("injected")
        raise self.error


@contextlib.contextmanager
def only_new_objects():
    """Have what is looked for among all objects be looked for among those that are made from here on."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Program:
    """One random program with one fault."""

    def __init__(self, subject, numbers, places=PLACES):
        self.subject, self.numbers = subject, numbers
        self.model, self.module = subject.model, subject.model._module
        forms = [
            self.in_a_block,
            self.in_a_block,
            self.with_a_cache,
            self.as_an_edit,
            self.as_invokes,
            self.nested,
            self.stopped,
        ]
        if subject.name == "a module":
            forms += [self.held, self.with_a_backward_pass]
        self.form = numbers.choice(forms)
        self.around = numbers.choice(["nothing", "nothing", *AROUND])
        if self.form == self.with_a_backward_pass or (self.form == self.as_invokes and self.around == "autocast"):
            self.around = "nothing"  # no gradients; and what is rounded so much differs in a batch
        place, kind = numbers.choice(places), numbers.choice(KINDS)
        if kind == "dropped trace":
            place = "body"
        many = {"a line of ours": 3000, "forward": 6, "hook": 6}.get(place, 4)
        self.fault = Fault(place, kind, numbers.randrange(many), self.collect)
        self.x, self.other = subject.given(numbers), subject.given(numbers)
        self.actions, self.other_actions = self.some_actions(), self.some_actions()
        self.seen, self.collecting, self.interrupted = {}, False, []

    def __str__(self):
        fault, form = f"{self.fault.kind} in {self.fault.place} ({self.fault.after})", self.form.__name__
        return " ".join([f"{self.subject.name}, {form}, {self.around} around: {fault}", *self.interrupted])

    def some_actions(self):
        """What to do at which events."""
        gradients = self.form == self.with_a_backward_pass
        actions, without = {}, set()
        for event in self.subject.events():
            if (event.step, event.path) in without or self.numbers.random() > 0.3:
                continue
            if event.step and self.form == self.as_an_edit:
                break
            action = self.numbers.choice(["read", "replace"] if gradients else ACTIONS)
            possible = event.kind == "input" and event.path in self.subject.skippable and self.fault.place != "edit"
            # Where one invoke replaces an input, what another changes in place is no longer what the model holds elsewhere.
            elsewhere = action == "in place" and event.kind == "input" and self.form == self.as_invokes
            if (action == "skip" and not possible) or elsewhere:
                action = "read"
            if action == "skip":
                part = self.module.get_submodule(event.path)
                inside = {f"{event.path}.{name}" for name, _ in part.named_modules() if name}
                without |= {(event.step, path) for path in inside}
            actions[event] = action
        return actions

    # What has to hold

    def broken(self):
        """What does not hold after the program has run."""
        before = everything(self.model)
        found = [*self.ran_wrong()]
        if self.interrupted:
            gc.collect()  # between two lines of ours a run may be left in a cycle with the functions of its invokes
        if everything(self.model) != before:
            found.append("the model or the thread is not as before")
        found += self.leaked()
        if not self.next_trace_is_right():
            found.append("the next trace is wrong")
        return found

    def ran_wrong(self):
        """Run the program; what it did that it should not."""
        raised = None
        try:
            with AROUND[self.around]():
                expected = [ByHand(self.subject, *each) for each in self.plain_programs()]
                raised, result = self.outcome()
                if raised is None and not (self.fault.happened and self.fault.kind == "dropped trace"):
                    yield from self.differs(result, expected)
                elif raised is None or isinstance(raised, DroppedError):
                    pass
                elif self.fault.place == "a line of ours":
                    if not isinstance(raised, KeyboardInterrupt):
                        yield f"{type(raised).__name__} was seen, and Ctrl-C was pressed: {raised}"
                elif raised is not self.fault.error:
                    yield f"{type(raised).__name__} was seen, and {self.fault.error!r} was raised: {raised}"
                yield from self.saw_wrong(expected)
        finally:
            raised = None
            self.end()

    def end(self):
        """Refer to nothing of the run any more: an error's traceback holds every frame of the program."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a held run is left behind
            self.fault.error, self.seen = None, {}
        self.subject.moments.happen = nothing

    def plain_programs(self):
        programs = [(self.actions, self.x.clone())]
        return [*programs, (self.other_actions, self.other.clone())] if self.form == self.as_invokes else programs

    def outcome(self):
        """What the program raised, and what came of it."""
        self.subject.moments.happen = self.fault.moment
        hooks = contextlib.ExitStack()
        for path in self.numbers.sample(self.subject.paths, 2):
            part = self.module.get_submodule(path)
            hooks.callback(part.register_forward_pre_hook(lambda *_: self.fault.moment("hook")).remove)
            hooks.callback(part.register_forward_hook(lambda *_: self.fault.moment("hook")).remove)
        if self.fault.place == "edit":
            path = self.numbers.choice(self.subject.paths)
            hooks.callback(self.model.edit(lambda: (self.model[path].output, self.fault.moment("edit")), inplace=True).remove)
        with hooks:
            try:
                with self.interruptions():
                    return None, self.form()
            except (InjectedError, DroppedError, RuntimeError, KeyboardInterrupt, MemoryError) as error:
                return error, None

    @contextlib.contextmanager
    def interruptions(self):
        """Ctrl-C at a line of ours, where that is the fault."""
        if self.fault.place != "a line of ours":
            yield
            return
        with interrupted_at(self.fault.after + 1) as self.interrupted:
            yield

    def differs(self, result, expected):
        """What came of a program that ran to its end, beside what plain hooks give."""
        want = torch.cat([each.result for each in expected])
        if self.form == self.stopped:
            return
        if result is None or not torch.allclose(result, want, atol=1e-4):
            yield f"the result is {result}, and with hooks {want}"
        if sum(len(each.seen) for each in expected) != len(self.seen) and self.form != self.as_an_edit:
            yield f"{len(self.seen)} values were seen"

    def saw_wrong(self, expected):
        """The values that were seen, beside those that plain hooks see."""
        for (event, which), value in self.seen.items():
            if not torch.allclose(value, expected[which].seen[event], atol=1e-4):
                yield f"at {event} was seen {value.mean()}, and with hooks {expected[which].seen[event].mean()}"

    def leaked(self):
        """What is still there of the run."""
        if not (found := self.remains()):
            return []
        del found
        gc.collect()  # an error of the user's may hold itself in a cycle
        return self.remains()

    def remains(self):
        """Frames on other stacks, runs, and traces that points would still mean."""
        found = []
        for each in gc.get_objects():
            if issubclass(type(each), greenlet):
                frame = each.gr_frame
                while frame is not None:
                    if frame.f_code.co_qualname not in IDLE:
                        found.append(f"a stack is paused in {frame.f_code.co_qualname}")
                    frame = frame.f_back
            elif issubclass(type(each), Run):
                found.append(f"a run is left, {'open' if each.open else 'closed'}")
        return found + ["a trace is still entered" for run, _ in _entered.get() if run() is not None]

    def next_trace_is_right(self):
        x = self.subject.given(random.Random(1))
        path = self.numbers.choice(self.subject.paths)
        event = Event(0, path, "output")
        want = ByHand(self.subject, {event: "read"}, x.clone())
        with self.subject.opened(x.clone()) as tracer:
            seen = self.model[path].output.clone()
        return torch.equal(seen, want.seen[event]) and torch.equal(tracer.result, want.result)

    # The forms of a program

    def act(self, event, action, which=0):
        """Do in a body what the program has for one event."""
        self.fault.moment("body")
        envoy = self.model[event.path]
        value = getattr(envoy, event.kind)
        if action == "in place":
            value.mul_(0.75)
        self.seen[event, which] = value.detach().clone()
        if action == "replace":
            setattr(envoy, event.kind, changed(value))
        elif action == "skip":
            envoy.skip(changed(value))
        self.fault.moment("body")

    def act_in_steps(self, tracer, actions, which=0):
        """Do in a body what the program has for all events."""
        for step in tracer.iter[:]:
            for event, action in actions.items():
                if event.step == step:
                    self.act(event, action, which)

    @contextlib.contextmanager
    def opened(self, *inputs):
        """The trace, with a watcher; a trace that is to be dropped is never exited."""
        tracer = self.subject.opened(*inputs)
        tracer.__enter__()
        try:
            if inputs:
                part = self.module.get_submodule(self.numbers.choice(self.subject.paths))
                tracer.watch(part, lambda visit: self.fault.moment("watcher"))
            yield tracer
        except DroppedError:
            raise
        except BaseException as error:
            if not tracer.__exit__(type(error), error, error.__traceback__):
                raise
        else:
            tracer.__exit__(None, None, None)

    def in_a_block(self):
        with self.opened(self.x.clone()) as tracer:
            self.act_in_steps(tracer, self.actions)
        return tracer.result

    def with_a_cache(self):
        with self.opened(self.x.clone()) as tracer:
            tracer.cache()
            self.act_in_steps(tracer, self.actions)
        return tracer.result

    def stopped(self):
        with self.opened(self.x.clone()) as tracer:
            self.act_in_steps(tracer, dict([*self.actions.items()][: len(self.actions) // 2]))
            tracer.stop()

    def nested(self):
        with self.opened(self.x.clone()) as tracer:
            for step in tracer.iter[:]:
                for event, action in self.actions.items():
                    if event.step == step:
                        self.act(event, action)
                if step == 0:
                    with self.opened(self.other.clone()) as inner:
                        _ = inner.model[self.numbers.choice(self.subject.paths)].output
                        self.fault.moment("body")
        return tracer.result

    def as_an_edit(self):
        """What is done in the first step, by an edit that stays."""

        def edit():
            if not (self.collecting or self.seen):
                self.fault.moment("edit")
                for event, action in self.actions.items():
                    self.act(event, action)

        with contextlib.ExitStack() as stack:
            stack.callback(self.model.edit(edit, inplace=True).remove)
            with self.opened(self.x.clone()) as tracer:
                _ = self.model[self.subject.paths[-1]].output
            return tracer.result

    def as_invokes(self):
        with self.opened() as tracer:
            tracer.invoke(self.x.clone(), lambda: self.act_in_steps(tracer, self.actions, 0))
            tracer.invoke(self.other.clone(), lambda: self.act_in_steps(tracer, self.other_actions, 1))
        return tracer.result

    def held(self):
        run = self.subject.opened(self.x.clone()).start()
        for event, action in self.actions.items():
            if self.numbers.random() < 0.2:
                other = run.fork()
                self.fault.moment("body")
                other.close()
            self.act(event, action)
        return run.finish()

    def with_a_backward_pass(self):
        with self.opened(self.x.clone()) as tracer:
            for event, action in self.actions.items():
                self.act(event, action)
            paths = [event.path for event in self.actions if event.kind == "output"]
            hidden = self.model[self.subject.paths[-1]].output
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: self.fault.moment("hook"))
            with tracer.backward(hidden.square().sum(), retain_graph=True):
                for path in reversed(paths):
                    self.fault.moment("body")
                    _ = self.model[path].output_grad
        return tracer.result

    def collect(self):
        """Have a trace that was left behind in a cycle be collected now."""
        self.collecting = True
        tracer = self.subject.opened(self.other.clone())
        tracer.__enter__()
        _ = tracer.model[self.numbers.choice(self.subject.paths)].output
        cycle = [tracer]
        cycle.append(cycle)
        run = weakref.ref(tracer._run)
        del tracer, cycle
        gc.collect()
        assert run() is None
        self.collecting = False
