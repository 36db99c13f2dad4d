"""Whether a trace of a model sees and changes what plain hooks do, in every module that runs.

row = checked(module, inputs, zeroed=24)
row.modules, row.problems
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from nnsight_eager import LanguageModel, NNsight, NotReachedError

STEPS = 3
CLOSE = 2e-5
PLAIN = (str, bytes, int, float, bool, type(None), torch.dtype, torch.device, torch.Size)


class Seen(NamedTuple):
    """What a hook has seen, in which step, before or behind which module."""

    step: int
    name: str
    kind: str  # inputs, output
    visit: int
    leaves: list[Any]


@dataclass
class Found:
    """What the checks of one model have found."""

    modules: int = 0
    compared: int = 0
    zeroed: int = 0
    patterns: int = 0
    steps: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what transformers itself cannot do here


def leaves(value: Any, above: tuple[int, ...] = ()) -> Iterator[Any]:
    """Copies of the tensors in a value, and the plain values beside them; nothing of ours takes part in it."""
    if isinstance(value, torch.Tensor):
        yield value.detach().clone()
    elif isinstance(value, PLAIN):
        yield value
    elif isinstance(value, Mapping):
        for key in value:
            yield from leaves(value[key], above)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from leaves(each, above)
    elif hasattr(value, "__dict__") and not callable(value) and id(value) not in above:  # a cache
        yield from leaves(vars(value), (*above, id(value)))


def differ(one: list[Any], other: list[Any]) -> bool:
    """Whether two lists of leaves differ, in any bit."""
    if len(one) != len(other):
        return True
    return any(not _same(left, right) for left, right in zip(one, other, strict=True))


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(one) is type(other) and bool(one == other)
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=one.is_floating_point() or one.is_complex())


@contextlib.contextmanager
def hooks(module: torch.nn.Module, see: Callable[[str, str, Any], None]) -> Iterator[None]:
    """Have `see` called with what goes into every module, and with what comes out."""
    handles = []
    for name, each in module.named_modules():

        def before(_: Any, args: Any, kwargs: Any, name: str = name) -> None:
            see(name, "inputs", (args, kwargs))

        def after(_: Any, args: Any, kwargs: Any, value: Any, name: str = name) -> None:
            see(name, "output", value)

        handles += [
            each.register_forward_pre_hook(before, with_kwargs=True),
            each.register_forward_hook(after, with_kwargs=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def seen_by_hooks(module: torch.nn.Module, call: Callable[[], Any]) -> list[Seen]:
    """Everything that goes into and comes out of the modules during a call, in the order in which it happens."""
    seen: list[Seen] = []
    visits: dict[tuple[int, str, str], int] = {}
    step = 0

    def see(name: str, kind: str, value: Any) -> None:
        nonlocal step
        visit = visits[step, name, kind] = visits.get((step, name, kind), -1) + 1
        seen.append(Seen(step, name, kind, visit, [*leaves(value)]))
        step += not name and kind == "output"

    with hooks(module, see):
        call()
    return seen


def seeded(call: Callable[[], Any]) -> Any:
    """What the call returns with the random numbers of every other such call."""
    torch.manual_seed(0)
    return call()


class Checks:
    """The checks of one model, on one input."""

    def __init__(self, module: torch.nn.Module, inputs: dict[str, Any]) -> None:
        self.module, self.inputs = module, inputs
        self.model = NNsight(module)
        self.found = Found()

    def forward(self, zeroed: int) -> None:
        """Reading, replacing and zeroing in a forward pass."""
        with torch.no_grad():
            result = [*leaves(seeded(lambda: self.module(**self.inputs)))]
            seen = seen_by_hooks(self.module, lambda: seeded(lambda: self.module(**self.inputs)))
            self.found.modules = len({each.name for each in seen})
            for _ in range(2):  # the first run learns the order of the modules, later ones use it
                self.reads([each for each in seen if not each.visit], lambda: self.model.trace(**self.inputs), "forward")
            self.keeps(seen)
            self.replaces(seen, result)
            for name in sample(self.module, seen, zeroed):
                self.zeroes(name)
                self.found.zeroed += 1
            for name in kinds(self.module):
                self.has_pattern(name, result)

    def generation(self) -> None:
        """Reading at each step of a generation."""
        options = {**self.inputs, "max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
        model = LanguageModel(self.module)
        expected = outcome(lambda: self.module.generate(**options))
        if differ(outcome(lambda: model.generate(**options).result), expected):
            self.problem("generate", "the result differs")
        if isinstance(expected[0], str):
            self.found.notes.append(f"plain `generate` raises {expected[0]}: {expected[1]}".splitlines()[0])
            return
        seen = seen_by_hooks(self.module, lambda: seeded(lambda: self.module.generate(**options)))
        self.found.steps = len({each.step for each in seen})
        tracer = self.reads([each for each in seen if not each.visit], lambda: model.generate(**options), "generate")
        if differ([*leaves(tracer.result)], expected):
            self.problem("generate, read", "the result differs")

    def problem(self, where: str, what: Any) -> None:
        text = f"{type(what).__name__}: {what}" if isinstance(what, Exception) else what
        self.found.problems.append(f"{where}: {text}".splitlines()[0])

    def reads(self, seen: list[Seen], trace: Callable[[], Any], what: str) -> Any:
        """Reading each point gives what the hook has seen there."""
        torch.manual_seed(0)
        with trace() as tracer:
            for each in seen:
                while tracer.model._tree.run().step < each.step:
                    tracer.next()
                where = f"{what}, step {each.step}, {each.name}.{each.kind}"
                try:
                    value = getattr(self.at(tracer.model, each.name), each.kind)
                except Exception as error:
                    self.problem(where, error)
                    break
                self.found.compared += 1
                if differ([*leaves(value)], each.leaves):
                    self.problem(where, "the value differs")
        return tracer

    def keeps(self, seen: list[Seen]) -> None:
        """A cache keeps every visit of every module."""
        torch.manual_seed(0)
        with self.model.trace(**self.inputs) as tracer:
            cache = tracer.cache(include_inputs=True)
        for each in seen:
            visits = cache[each.name].visits if each.name in cache else []
            where = f"cache, {each.name}.{each.kind}, visit {each.visit}"
            if len(visits) <= each.visit:
                self.problem(where, "is not there")
            elif differ([*leaves(getattr(visits[each.visit], each.kind))], each.leaves):
                self.problem(where, "the value differs")

    def replaces(self, seen: list[Seen], result: list[Any]) -> None:
        """Replacing everything with what it is changes nothing."""
        torch.manual_seed(0)
        with self.model.trace(**self.inputs) as tracer:
            for each in seen:
                if not each.visit:
                    envoy = self.at(tracer.model, each.name)
                    setattr(envoy, each.kind, getattr(envoy, each.kind))
        if differ([*leaves(tracer.result)], result):
            self.problem("replacing with the same value", "the result differs")

    def zeroes(self, name: str) -> None:
        """Zeroing what a module gives has the effect that a hook has which gives zeros."""
        done = []

        def zero(_: Any, args: Any, value: Any) -> Any:
            if not done:
                done.append(name)
                return zeros(value)
            return None

        # In front of transformers' own recorders, which a first call has left behind: they are to see the zeros.
        handle = self.module.get_submodule(name).register_forward_hook(zero, prepend=True)
        try:
            expected = outcome(lambda: self.module(**self.inputs))
        finally:
            handle.remove()

        def traced() -> Any:
            with self.model.trace(**self.inputs) as tracer:
                envoy = self.at(tracer.model, name)
                envoy.output = zeros(envoy.output)
            return tracer.result

        if differ(outcome(traced), expected):
            self.problem(f"zeroing {name}", "the result differs")

    def has_pattern(self, name: str, result: list[Any]) -> None:
        """Where a module has an attention pattern, rows of it are at most 1, and the model goes on as without asking for it."""
        torch.manual_seed(0)
        try:
            with self.model.trace(**self.inputs) as tracer:
                pattern = self.at(tracer.model, name).pattern
        except NotReachedError:  # it is no attention of the library's interface, or does not run
            return
        self.found.patterns += 1
        if not bool((pattern.sum(-1) < 1 + CLOSE).all() and (pattern >= 0).all()):
            self.problem(f"{name}.pattern", "it is none")
        if not near([*leaves(tracer.result)], result):
            self.problem(f"{name}.pattern", "the result differs")

    @staticmethod
    def at(root: Any, name: str) -> Any:
        return root[name] if name else root


def kinds(module: torch.nn.Module) -> list[str]:
    """One module of each class, and of each that looks back otherwise."""
    found: dict[Any, str] = {}
    for name, each in module.named_modules():
        found.setdefault((type(each), getattr(each, "is_causal", None), getattr(each, "sliding_window", None)), name)
    return [*found.values()]


def near(one: list[Any], other: list[Any]) -> bool:
    """Whether two lists of leaves are the same up to rounding; what is no number is not looked at."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if isinstance(a, torch.Tensor) and a.is_floating_point()]
    return all(torch.allclose(a, b, rtol=CLOSE, atol=CLOSE, equal_nan=True) for a, b in pairs)


def outcome(call: Callable[[], Any]) -> list[Any]:
    """What the call returns, or the error it raises."""
    try:
        return [*leaves(seeded(call))]
    except Exception as error:
        return [type(error).__name__, str(error)]


def zeros(value: Any) -> Any:
    """The value with zeros in it; the caches in it as they are."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, Mapping):
        return type(value)(**{key: zeros(each) for key, each in value.items()})
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(zeros(each) for each in value)
    return value


def sample(module: torch.nn.Module, seen: list[Seen], most: int) -> list[str]:
    """At most so many of the modules that run: one of each class before others, spread over the model."""
    names = list(dict.fromkeys(each.name for each in seen if each.name and each.kind == "output"))
    classes = {type(module.get_submodule(name)): name for name in reversed(names)}
    first = [name for name in names if name in classes.values()]
    others = [name for name in names if name not in first]
    chosen = spread(first, most)
    return [*chosen, *spread(others, most - len(chosen))]


def spread(names: list[str], count: int) -> list[str]:
    """So many of the names, at even distances."""
    return [names[number * len(names) // count] for number in range(count)] if len(names) > count else names
