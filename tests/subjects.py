"""Small models with moments at which something may happen, and programs on them done by plain hooks.

subject = net()
by_hand = ByHand(subject, {Event(0, "h.0", "output"): "replace"}, x)
by_hand.seen, by_hand.result
"""

import contextlib
import random
from typing import NamedTuple

import torch

from nnsight_eager import LanguageModel, NNsight

WIDTH = 4


def nothing(place):
    """What happens where no program runs."""


class Moments:
    """What the modules of a model tell when they come by a moment."""

    def __init__(self):
        self.happen = nothing

    def __call__(self, place):
        self.happen(place)


class Layer(torch.nn.Module):
    """A residual layer."""

    def __init__(self, moment):
        super().__init__()
        self.first, self.second = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.moment = moment

    def forward(self, x):
        self.moment("forward")
        hidden = self.first(x)
        try:
            self.moment("forward")
            hidden = self.second(hidden.sin())
        finally:
            after = torch.zeros(1)  # torch is used in a `finally` block as well
        return x + hidden + after


class Net(torch.nn.Module):
    """Layers, a norm that is used between all of them, and a head."""

    def __init__(self, moment):
        super().__init__()
        self.h = torch.nn.ModuleList(Layer(moment) for _ in range(2))
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.head = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for layer in self.h:
            x = self.norm(layer(x))
        return self.head(x)

    def generate(self, x, steps=2):
        """What a generation does: forwards without gradients, one after another."""
        with torch.no_grad():
            for _ in range(steps):
                x = self(x)
        return x


class Activation(torch.nn.Module):
    """The activation of a language model that comes by moments."""

    def __init__(self, moment):
        super().__init__()
        self.moment = moment

    def forward(self, x):
        self.moment("forward")
        return torch.nn.functional.gelu(x)


class Event(NamedTuple):
    """A point at its first visit in a step."""

    step: int
    path: str
    kind: str


class Subject(NamedTuple):
    """A model, how it is called plainly and with its insides open, and the points a program may use."""

    name: str
    model: NNsight
    moments: Moments
    given: object  # an input, from a generator of random numbers
    plainly: object
    opened: object
    paths: tuple[str, ...]
    skippable: tuple[str, ...]

    def events(self):
        """Every point by its order."""
        return ByHand(self, {}, self.given(random.Random(0))).events


def subjects():
    """The models that programs run on."""
    return [net(), generation(), language_model()]


def net():
    torch.manual_seed(0)
    moments = Moments()
    model = NNsight(Net(moments))
    paths = tuple(path for path, module in model._module.named_modules() if path not in ("", "h"))
    return Subject(
        "a module",
        model,
        moments,
        given=lambda numbers: torch.tensor([[numbers.uniform(-1, 1) for _ in range(WIDTH)]]),
        plainly=lambda module, x: module(x),
        opened=lambda *x: model.trace(*x),
        paths=paths,
        skippable=paths,
    )


def generation():
    subject = net()
    return subject._replace(
        name="a generation",
        plainly=lambda module, x: module.generate(x),
        opened=lambda *x: subject.model.trace(*x, fn="generate"),
    )


def language_model():
    from transformers import GPT2Config, GPT2LMHeadModel

    moments = Moments()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    module = GPT2LMHeadModel(config).eval()
    for block in module.transformer.h:
        block.mlp.act = Activation(moments)
    model = LanguageModel(module)
    options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    inside = ("ln_1", "attn.c_proj", "mlp", "mlp.c_fc", "mlp.act", "mlp.c_proj")
    paths = (*(f"transformer.h.{i}.{name}" for i in range(2) for name in inside), "transformer.ln_f", "lm_head")
    return Subject(
        "a language model",
        model,
        moments,
        given=lambda numbers: torch.tensor([[numbers.randrange(1, 64) for _ in range(4)]]),
        plainly=lambda module, ids: module.generate(ids, attention_mask=torch.ones_like(ids), **options),
        opened=lambda *ids: model.generate(*ids, **options),
        paths=paths,
        skippable=tuple(path for path in paths if path.endswith(("ln_1", "mlp", "act", "ln_f"))),
    )


def changed(value):
    return value * 1.5 + 0.25


class ByHand:
    """A program done by plain hooks: every event on the way, what was seen at those that have an action, and the result."""

    def __init__(self, subject, actions, x):
        self.actions, self.events, self.seen, self.step, self.left_out = actions, [], {}, 0, {}
        module = subject.model._module
        with contextlib.ExitStack() as hooks:
            for path in subject.paths:
                part = module.get_submodule(path)
                hooks.callback(part.register_forward_pre_hook(self.before(path)).remove)
                hooks.callback(part.register_forward_hook(self.after(path)).remove)
                part.forward = self.unless_skipped(part)
                hooks.callback(part.__dict__.pop, "forward")
            hooks.callback(module.register_forward_hook(self.step_ends).remove)
            self.result = subject.plainly(module, x)

    def step_ends(self, *_):
        self.step += 1

    def unless_skipped(self, module):
        def forward(x):
            return self.left_out.pop(module) if module in self.left_out else type(module).forward(module, x)

        return forward

    def before(self, path):
        def hook(module, args):
            event = Event(self.step, path, "input")
            if event in self.events:
                return None
            self.events.append(event)
            value, action = self.act(event, args[0])
            if action == "skip":
                self.left_out[module] = value
                return None
            return (value,)

        return hook

    def after(self, path):
        def hook(module, args, output):
            event = Event(self.step, path, "output")
            if event in self.events:
                return None
            self.events.append(event)
            return self.act(event, output)[0]

        return hook

    def act(self, event, value):
        action = self.actions.get(event)
        if action is not None:
            if action == "in place":
                value.mul_(0.75)
            self.seen[event] = value.detach().clone()
            if action in ("replace", "skip"):
                value = changed(value)
        return value, action
