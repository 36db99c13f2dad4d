"""Any programs of several invokes give what plain hooks give on each prompt alone, batched or not: values and gradients."""

import functools
from typing import NamedTuple

import pytest
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings, strategies as st

from nnsight_eager import LanguageModel, NNsight
from nnsight_eager.errors import PointError

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LAYERS = 2
SIZES = {
    "gpt2": {"n_embd": 8, "n_layer": LAYERS, "n_head": 2, "n_positions": 32},
    "gpt_neox": {
        "hidden_size": 8,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 32,
    },
}
# Where values are read and changed, in the order in which the model comes by.
BEFORE = {"gpt2": ["transformer.drop.hidden"], "gpt_neox": ["gpt_neox.emb_dropout.hidden"]}
LAYER = {
    "gpt2": [
        "transformer.h.{}.input",
        "transformer.h.{}.ln_1.hidden",
        "transformer.h.{}.attn.c_attn.hidden",
        "transformer.h.{}.attn.hidden",
        "transformer.h.{}.mlp.input",
        "transformer.h.{}.mlp.c_fc.hidden",
        "transformer.h.{}.mlp.hidden",
        "transformer.h.{}.hidden",
    ],
    "gpt_neox": [
        "gpt_neox.layers.{}.input",
        "gpt_neox.layers.{}.attention.query_key_value.hidden",
        "gpt_neox.layers.{}.attention.hidden",
        "gpt_neox.layers.{}.mlp.input",
        "gpt_neox.layers.{}.mlp.dense_h_to_4h.hidden",
        "gpt_neox.layers.{}.mlp.hidden",
        "gpt_neox.layers.{}.hidden",
    ],
}
AFTER = {
    "gpt2": ["transformer.ln_f.hidden", "lm_head.input", "lm_head.hidden"],
    "gpt_neox": ["gpt_neox.final_layer_norm.input", "gpt_neox.final_layer_norm.hidden"],
}


def points_of(kind):
    """Every point as `(module, input or hidden)`."""
    names = [*BEFORE[kind], *(name.format(layer) for layer in range(LAYERS) for name in LAYER[kind]), *AFTER[kind]]
    return [tuple(name.rsplit(".", 1)) for name in names]


@functools.cache
def small(kind, vocabulary):
    torch.manual_seed(0)
    special = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(kind, **special, **SIZES[kind])
    module = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


class Prompt(NamedTuple):
    """What an invoke is given, and the ids of each of its rows."""

    given: object
    rows: list


WORDS = ["The Eiffel", "Rome", "Mary and John went to the", "New York City", "store, 0123"]
ids = st.lists(st.integers(1, 200), min_size=1, max_size=6)
prompts = st.one_of(
    st.sampled_from(WORDS),
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=3),
    ids,
    st.lists(ids, min_size=1, max_size=3),
    ids.map(lambda row: torch.tensor([row])),
    ids.map(lambda row: {"input_ids": torch.tensor([row, row[::-1]])}),
)
actions = st.lists(
    st.sampled_from([None, None, None, "read", "replace", "in place", "patch", "patch in place", "read and replace and read"]),
    max_size=20,
)


def rows_of(prompt, tokenizer):
    """The ids of each row, told by hand."""
    if isinstance(prompt, dict):
        prompt = prompt["input_ids"]
    if isinstance(prompt, torch.Tensor):
        return prompt.tolist()
    if isinstance(prompt, str):
        prompt = [prompt]
    if isinstance(prompt[0], str):
        return [tokenizer(text)["input_ids"] for text in prompt]
    return [prompt] if isinstance(prompt[0], int) else prompt


def patch_for(plans, invoke, event):
    """The latest value that the nearest earlier invoke has met by then: invokes go on in the order written."""
    for earlier in reversed(range(invoke)):
        for before in reversed(range(min(event + 1, len(plans[earlier])))):
            if plans[earlier][before] is not None:
                return earlier, before
    return None


def act(action, value, patch, write):
    """One step of a program, whatever `value` is read from and whatever `write` replaces; what it has seen."""
    seen = [value.clone()]
    if action == "replace":
        write(value * 1.5 + 0.25)
    elif action == "in place":
        value.mul_(0.75)
    elif action == "patch":
        new = value.clone()
        new[:, -1] = patch
        write(new)
    elif action == "patch in place":
        value[:, -1] += patch
    elif action == "read and replace and read":
        write(value.sin())
        seen.append(value.sin())
    return seen


class ByHand:
    """The programs done by plain hooks, each row of each invoke alone: what they saw, and the logits."""

    def __init__(self, module, points, plans, prompts):
        self.met, self.logits = {}, []
        self.module, self.points, self.plans = module, points, plans
        for invoke, prompt in enumerate(prompts):
            self.logits.append([self.alone(invoke, row) for row in prompt.rows])

    def alone(self, invoke, row):
        handles = []
        for event, action in enumerate(self.plans[invoke]):
            if action is not None:
                name, kind = self.points[event]
                module = self.module.get_submodule(name)
                register = module.register_forward_pre_hook if kind == "input" else module.register_forward_hook
                handles.append(register(functools.partial(self.hook, invoke, event, action)))
        try:
            return self.module(torch.tensor([row])).logits
        finally:
            for handle in handles:
                handle.remove()

    def hook(self, invoke, event, action, module, args, *output):
        whole = output[0] if output else args
        value, rest = (whole, None) if isinstance(whole, torch.Tensor) else (whole[0], whole[1:])
        new = [value]
        source = patch_for(self.plans, invoke, event)
        patch = torch.ones(()) if source is None else torch.cat([seen[0][:, -1] for seen in self.met[source]]).mean(0)[0]
        seen = act(action, value, patch, lambda changed: new.append(changed))
        self.met.setdefault((invoke, event), []).append(seen)
        return new[-1] if rest is None else (new[-1], *rest)


class ByInvokes:
    """The same programs as the bodies of one trace's invokes."""

    def __init__(self, model, points, plans, prompts, batched):
        self.model, self.points, self.plans = model, points, plans
        self.met = {}
        with model.trace(batched=batched) as tracer:
            for invoke, prompt in enumerate(prompts):
                tracer.invoke(prompt.given, functools.partial(self.body, invoke))
        results = [tracer.result] if batched else tracer.result
        self.last = torch.cat([result.logits[:, -1] for result in results])

    def body(self, invoke):
        for event, action in enumerate(self.plans[invoke]):
            if action is not None:
                name, kind = self.points[event]
                envoy = self.model[name]
                source = patch_for(self.plans, invoke, event)
                value = getattr(envoy, kind)
                patch = torch.ones(()) if source is None else self.met[source][0][:, -1].mean(0)[0]
                self.met[invoke, event] = act(
                    action, value, patch, lambda new, envoy=envoy, kind=kind: setattr(envoy, kind, new)
                )
                if action.endswith("and read"):
                    assert torch.equal(getattr(envoy, kind), self.met[invoke, event][-1])


def gradients(module, last):
    return torch.autograd.grad(last.square().sum(), [*module.parameters()], retain_graph=True)


def close(one, other):
    return torch.allclose(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", SIZES)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(st.tuples(prompts, actions), min_size=1, max_size=5))
@example([("Rome", ["read"]), (["Rome", "New York City"], ["patch in place"]), ([[3], [4, 5]], [None, "patch"])])
@example([([9], ["in place"] * 20), ("The Eiffel", ["patch"] * 20), ([[9], [8, 7]], ["read and replace and read"] * 20)])
def test_programs_give_what_plain_hooks_give_on_each_prompt_alone(tokenizer, kind, invokes):
    module, points = small(kind, len(tokenizer)), points_of(kind)
    prompts = [Prompt(prompt, rows_of(prompt, tokenizer)) for prompt, _ in invokes]
    plans = [plan[: len(points)] for _, plan in invokes]
    hand = ByHand(module, points, plans, prompts)
    last = torch.cat([logits[:, -1] for rows in hand.logits for logits in rows])
    wanted = gradients(module, last)
    model = LanguageModel(module, tokenizer=tokenizer)
    for batched in (True, True, False):  # the first run learns the order of the modules, later ones use it
        ours = ByInvokes(model, points, plans, prompts, batched)
        assert close(ours.last, last)
        assert all(map(close, gradients(module, ours.last), wanted))
        assert ours.met.keys() == hand.met.keys()
        for (invoke, event), values in ours.met.items():
            for number, row in enumerate(prompts[invoke].rows):
                for value, alone in zip(values, hand.met[invoke, event][number], strict=True):
                    assert close(value[number : number + 1, -len(row) :], alone)
    assert not any("forward" in each.__dict__ or each._forward_hooks for each in module.modules())


# Over the steps of a generation


class Steps(torch.nn.Module):
    """Three layers, called again on what they have made; some steps leave one out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(3)).double()

    def forward(self, x, number):
        for place, layer in enumerate(self.layers):
            if (number + place) % 3:
                x = x + layer(x).sin()
        return x

    def generate(self, x, steps):
        for number in range(steps):
            x = self(x, number)
        return x


step_programs = st.lists(
    st.tuples(
        st.one_of(st.none(), st.lists(st.integers(0, 4), unique=True).map(sorted)),  # `None`: no loop
        st.lists(st.tuples(st.sampled_from([0, 1, 2]), st.sampled_from(["input", "output"]), st.booleans()), max_size=4),
        st.sampled_from(["end", "end", "stop", "result"]),
    ),
    min_size=1,
    max_size=4,
)


def over_steps(model, tracer, program):
    """A body: asks in the chosen steps, edits of some, and everything it has met, up to an error's first line."""
    selection, asks, end = program
    met = []

    def one_step():
        for place, kind, edited in asks:
            value = getattr(model.layers[place], kind)
            met.append(value.clone())
            if edited:
                setattr(model.layers[place], kind, value * 0.5 + 1)

    def steps():
        if selection is None:
            one_step()
        else:
            for step in tracer.iter[selection]:
                met.append(step)
                one_step()

    def body():
        try:
            steps()
        except PointError as error:  # where it is told depends on what the others listen to: at once, or as the step ends
            met.append(str(error).splitlines()[0])
        if end == "stop":
            tracer.stop()
        if end == "result":
            met.append("result" if tracer.result is not None else None)

    return body, met


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and close(one, other)
    return one == other


@pytest.mark.filterwarnings("ignore:Step .* never came")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(step_programs, st.integers(0, 4))
@example([(None, [(1, "input", False), (0, "input", False)], "end"), (None, [(1, "output", False)], "end")], 1)
@example([([1], [], "end"), (None, [(0, "input", False)], "end")], 0)  # one has gone beyond the last step, the other has not
def test_bodies_at_different_steps_meet_what_each_meets_alone(programs, steps):
    model = NNsight(Steps())
    inputs = [torch.full((1 + number % 2, 3), float(number), dtype=torch.float64) for number in range(len(programs))]
    _ = model.trace(inputs[0], max(steps, 3), fn=model._module.generate).result  # alone and together know the same order
    alone = []
    for x, program in zip(inputs, programs, strict=True):
        with model.trace(x, steps, fn=model._module.generate) as tracer:
            body, met = over_steps(model, tracer, program)
            body()
        alone.append((met, None if program[2] == "stop" else tracer.result))
    with model.trace(fn=model._module.generate, steps=steps) as tracer:
        together = []
        for x, program in zip(inputs, programs, strict=True):
            body, met = over_steps(model, tracer, program)
            tracer.invoke(x, body)
            together.append(met)
    for met, (wanted, _) in zip(together, alone, strict=True):
        assert len(met) == len(wanted)
        assert all(map(same, met, wanted))
    if all(program[2] != "stop" for program in programs):
        assert close(tracer.result, torch.cat([result for _, result in alone]))
