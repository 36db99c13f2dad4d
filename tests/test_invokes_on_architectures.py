"""In every module of real architectures an invoke reads its rows or is refused, never the whole batch or others' rows."""

import functools
from typing import NamedTuple

import pytest
import torch
import transformers

from nnsight_eager import LanguageModel
from nnsight_eager.errors import RowsError
from nnsight_eager.nested import tensors

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.filterwarnings("ignore:.*num_beams.*:UserWarning"),
]

WIDE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_key_value_heads": 2, "num_experts_per_tok": 2}
SIZES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": {**WIDE, "num_key_value_heads": 2},
    "gpt_neox": WIDE,
    "bert": WIDE,
    "t5": {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 64, "d_kv": 8, "decoder_start_token_id": 0},
    "mixtral": {**WIDE, **EXPERTS, "num_local_experts": 3},
    "qwen2_moe": {**WIDE, **EXPERTS, "num_experts": 3, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
}
AUTOMODELS = {"bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM"}
GENERATING = [kind for kind in SIZES if kind != "bert"]

# Three invokes, of 1, 2 and 1 rows: their number is no divisor of a length, of a width or of the number of heads or experts
# that would let a size be taken for it.
INPUTS = [
    torch.tensor([[5, 6, 7, 8, 9, 10, 11]]),
    torch.tensor([[12, 13, 14], [15, 16, 17]]),
    torch.tensor([[18, 19, 20, 21, 22]]),
]
ROWS = [slice(0, 1), slice(1, 3), slice(3, 4)]
TOTAL, LONGEST = 4, 7


class Padding:
    """A tokenizer that only has something to pad with."""

    pad_token_id = 0


@functools.cache
def small(kind):
    torch.manual_seed(0)
    special = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(kind, **special, **SIZES[kind])
    module = getattr(transformers, AUTOMODELS.get(kind, "AutoModelForCausalLM")).from_config(config).eval()
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return LanguageModel(module, tokenizer=Padding())


def by_hand(kind, generates=False):
    """The padded batch of the inputs, as one would write it for the module itself."""
    ids, mask = torch.zeros(TOTAL, LONGEST, dtype=torch.long), torch.zeros(TOTAL, LONGEST, dtype=torch.long)
    for rows, given in zip(ROWS, INPUTS, strict=True):
        columns = slice(0, given.shape[1]) if kind in AUTOMODELS else slice(LONGEST - given.shape[1], LONGEST)
        ids[rows, columns], mask[rows, columns] = given, 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if kind == "t5" and not generates:
        batch["decoder_input_ids"] = torch.zeros(TOTAL, 1, dtype=torch.long)
    elif kind not in AUTOMODELS and not generates:
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return batch


class Seen(NamedTuple):
    """A value that a plain hook has seen: in which step, at which module, in its call or in its answer."""

    step: int
    name: str
    kind: str
    value: list  # its tensors


def copied(value):
    return [each.detach().clone() for each in tensors(value)]


def seen_by_hooks(module, call, steps):
    """What every module receives and returns at its first visit of each step, in the order in which it happens."""
    seen, done, step, handles = [], set(), [0], []

    def note(name, kind, value):
        if step[0] < steps and (step[0], name, kind) not in done:
            done.add((step[0], name, kind))
            seen.append(Seen(step[0], name, kind, copied(value)))

    for name, each in module.named_modules():

        def before(_, args, kwargs, name=name):
            note(name, "inputs", (args, kwargs))

        def after(_, args, kwargs, value, name=name):
            note(name, "output", value)
            step[0] += not name

        handles += [
            each.register_forward_pre_hook(before, with_kwargs=True),
            each.register_forward_hook(after, with_kwargs=True),
        ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def seen_by_invokes(model, open_trace, seen):
    """What each invoke reads there: the tensors and whether there is but one, or the refusal."""

    def read(tracer):
        found = []
        for point in seen:
            while tracer.model._tree.run().step < point.step:
                tracer.next()
            envoy = model[point.name] if point.name else model
            try:
                value = getattr(envoy, point.kind)
                found.append((copied(value), len(copied(value)) == 1))
            except RowsError as error:
                found.append(error)
        return found

    torch.manual_seed(0)
    with open_trace() as tracer:
        invokes = [tracer.invoke(given)(lambda: read(tracer)) for given in INPUTS]
    return [invoke.result for invoke in invokes]


def check(kind, seen, read):
    """Each invoke has read exactly its rows of what the hooks have seen; what has no rows was refused."""
    assert seen
    for rows, values in zip(ROWS, read, strict=True):
        for point, got in zip(seen, values, strict=True):
            where = f"{point.name}.{point.kind} in step {point.step}"
            assert isinstance(got, RowsError) == has_no_rows(kind, point.name), where
            if isinstance(got, RowsError):
                continue
            tensors_read, alone = got
            for part, whole in zip(tensors_read, point.value, strict=True):
                factor, rest = divmod(whole.shape[0], TOTAL) if whole.dim() else (0, 1)
                if rest:
                    assert whole.dim() == 0 or whole.shape[0] == 1 or not alone, where
                    assert torch.equal(part, whole), where
                else:
                    assert torch.equal(part, whole[rows.start * factor : rows.stop * factor]), where


# What has no rows: a bias `[query, key, heads]`, and tokens sorted by expert (transformers 4.57: the tokens of one expert).
REFUSED = {
    "t5": ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias",),
    "mixtral": ("experts.act_fn", "experts.0", "experts.1", "experts.2"),
    "qwen2_moe": ("experts.act_fn", "experts.0", "experts.1", "experts.2"),
}


def has_no_rows(kind, name):
    return any(f"{part}." in f"{name}." for part in REFUSED.get(kind, ()))


@pytest.mark.parametrize("kind", SIZES)
def test_every_module_gives_an_invoke_its_rows_or_refuses(kind):
    model = small(kind)
    batch = by_hand(kind)
    with torch.no_grad():
        seen = seen_by_hooks(model._module, lambda: model._module(**batch), 1)
        for _ in range(2):  # the first run learns the order of the modules, later ones use it
            check(kind, seen, seen_by_invokes(model, model.trace, seen))


@pytest.mark.parametrize("kind", GENERATING)
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"num_beams": 2, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    ],
    ids=["greedy", "beams", "sequences", "beams and sequences"],
)
def test_every_module_gives_an_invoke_its_rows_in_each_step_of_a_generation(kind, options):
    model = small(kind)
    options = {**options, "max_new_tokens": 3, "min_new_tokens": 3}

    def plain():
        torch.manual_seed(0)
        model._module.generate(**by_hand(kind, generates=True), pad_token_id=0, **options)

    seen = seen_by_hooks(model._module, plain, 2)
    assert {point.step for point in seen} == {0, 1}
    check(kind, seen, seen_by_invokes(model, lambda: model.generate(**options), seen))


@pytest.mark.parametrize("kind", SIZES)
def test_the_logits_of_each_row_are_those_of_its_input_alone(kind):
    model = small(kind)
    name, _ = max(model._module.named_children(), key=lambda child: child[0] in ("cls", "embed_out", "lm_head"))
    head = model[name]
    with torch.no_grad():
        with model.trace() as tracer:
            logits = [tracer.invoke(given)(lambda: head.output) for given in INPUTS]
        for invoke, given in zip(logits, INPUTS, strict=True):
            start = {"decoder_input_ids": torch.zeros(len(given), 1, dtype=torch.long)} if kind == "t5" else {}
            alone = model._module(given, **start).logits
            length = alone.shape[1]
            real = invoke.result[:, :length] if kind in AUTOMODELS else invoke.result[:, -length:]
            assert torch.allclose(real, alone, atol=1e-5)


@pytest.mark.parametrize("kind", SIZES)
def test_zeros_written_in_one_invoke_at_any_module_reach_no_other_row(kind):
    """For each tensor a module returns: the other rows' logits are those of the batch that nobody edits."""
    model = small(kind)
    with torch.no_grad():
        plain = model._module(**by_hand(kind)).logits
        seen = seen_by_hooks(model._module, lambda: model._module(**by_hand(kind)), 1)
        edited = 0
        for point in seen:
            if point.kind != "output" or has_no_rows(kind, point.name) or point.value[0].shape[0] == 1:
                continue

            def zero(name=point.name):
                envoy = model[name] if name else model
                envoy.hidden = torch.zeros_like(envoy.hidden)

            with model.trace() as tracer:
                tracer.invoke(INPUTS[0], lambda: None)
                tracer.invoke(INPUTS[1], zero)
                tracer.invoke(INPUTS[2], lambda: None)
            logits = tracer.result.logits
            assert torch.allclose(logits[[0, 3]], plain[[0, 3]], atol=1e-5), point.name
            edited += not torch.allclose(logits[1:3], plain[1:3], atol=1e-5)
        assert edited > 10
