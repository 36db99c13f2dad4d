"""Several inputs as one batch of equal length: every row computes what it computes alone."""

import pytest
import torch

from nnsight_eager import LanguageModel
from nnsight_eager.errors import BatchError, PaddingError
from nnsight_eager.padding import positions, together

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SHORT, LONG = torch.tensor([[5, 6]]), torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])
PROMPTS = ["The Eiffel Tower is in the city of", "Rome", "When Mary and John went to the store, John gave a drink to"]


def ids(**more):
    return [{"input_ids": SHORT, **more.pop("short", {})}, {"input_ids": LONG, **more.pop("long", {})}]


def listed(batch):
    return {name: value.tolist() for name, value in batch.items()}


# The keywords of one call


def test_shorter_rows_are_padded_on_the_side_of_the_model_and_masked():
    left, sizes = together(ids(), "left", 3)
    right, _ = together(ids(), "right", 3)
    assert sizes == [1, 2]
    assert listed(left) == {
        "input_ids": [[3, 3, 5, 6], *LONG.tolist()],
        "attention_mask": [[0, 0, 1, 1], [1] * 4, [1] * 4],
    }
    assert listed(right) == {
        "input_ids": [[5, 6, 3, 3], *LONG.tolist()],
        "attention_mask": [[1, 1, 0, 0], [1] * 4, [1] * 4],
    }


def test_rows_of_one_length_need_neither_padding_nor_a_mask():
    batch, sizes = together([{"input_ids": SHORT}, {"input_ids": SHORT + 1}], "left", None)
    assert listed(batch) == {"input_ids": [[5, 6], [6, 7]]}
    assert sizes == [1, 1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_of_one_input_is_kept_and_another_gets_ones(side):
    batch, _ = together(ids(long={"attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])}), side, 0)
    short = [0, 0, 1, 1] if side == "left" else [1, 1, 0, 0]
    assert batch["attention_mask"].tolist() == [short, [0, 1, 1, 1], [1, 1, 1, 0]]


@pytest.mark.parametrize(
    ("name", "fill", "absent"),
    [("token_type_ids", 0, 0), ("special_tokens_mask", 1, None)],
)
def test_what_goes_with_each_token_is_padded_as_the_tokens_are(name, fill, absent):
    both = ids(short={name: torch.tensor([[20, 21]])}, long={name: LONG + 30})
    batch, _ = together(both, "left", 0)
    assert batch[name].tolist() == [[fill, fill, 20, 21], *(LONG + 30).tolist()]
    del both[0][name]
    if absent is not None:
        assert together(both, "left", 0)[0][name][0].tolist() == [fill, fill, absent, absent]


def test_labels_are_padded_with_what_losses_leave_out_as_is_the_first_token_behind_padding():
    given = ids(short={"labels": SHORT}, long={"labels": LONG})
    assert together(given, "left", 0)[0]["labels"].tolist() == [[-100, -100, -100, 6], *LONG.tolist()]
    assert together(given, "right", 0)[0]["labels"].tolist() == [[5, 6, -100, -100], *LONG.tolist()]
    assert SHORT.tolist() == [[5, 6]]
    del given[0]["labels"]
    assert together(given, "left", 0)[0]["labels"][0].tolist() == [-100] * 4


def test_embeddings_are_padded_with_zeros():
    short, long = torch.ones(1, 2, 3), torch.ones(1, 4, 3)
    batch, _ = together([{"inputs_embeds": short}, {"inputs_embeds": long}], "left", None)
    assert batch["inputs_embeds"].sum(-1).tolist() == [[0, 0, 3, 3], [3, 3, 3, 3]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_positions_of_one_input_are_kept_and_another_is_counted_from_its_first_real_token():
    given = ids(
        short={"position_ids": torch.tensor([[40, 41]])}, long={"attention_mask": torch.tensor([[0, 1, 1, 1], [1] * 4])}
    )
    batch, _ = together(given, "left", 0)
    assert batch["position_ids"].tolist() == [[0, 0, 40, 41], [0, 0, 1, 2], [0, 1, 2, 3]]


def test_positions_count_real_tokens():
    assert positions(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]


def test_what_a_decoder_is_given_is_padded_to_its_own_length_on_the_right():
    given = ids(
        short={"decoder_input_ids": torch.tensor([[0, 1, 2]]), "decoder_attention_mask": torch.ones(1, 3)},
        long={"decoder_input_ids": torch.tensor([[0], [0]]), "decoder_attention_mask": torch.ones(2, 1)},
    )
    batch, _ = together(given, "right", 9)
    assert batch["decoder_input_ids"].tolist() == [[0, 1, 2], [0, 9, 9], [0, 9, 9]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]


def test_what_does_not_go_with_each_token_is_padded_on_the_right():
    given = ids(short={"choices": torch.tensor([[1, 2, 3]])}, long={"choices": torch.tensor([[4], [5]])})
    assert together(given, "left", 0)[0]["choices"].tolist() == [[1, 2, 3], [4, 0, 0], [5, 0, 0]]


def test_a_label_for_each_row_is_not_padded():
    batch, _ = together(ids(short={"labels": torch.tensor([1])}, long={"labels": torch.tensor([2, 3])}), "right", 0)
    assert batch["labels"].tolist() == [1, 2, 3]


NO_ROWS = (
    "`{0}` cannot be given for one input: it has no rows, so it would apply to all of them.\n"
    "Give it to the trace: `model.trace({0}=...)`."
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output_hidden_states", True),
        ("max_new_tokens", 3),
        ("use_cache", False),
        ("temperature", torch.tensor(0.5)),
        ("labels", torch.zeros(3, 2)),
        ("past_key_values", object()),
    ],
)
def test_a_keyword_of_one_input_that_has_no_rows_is_refused(name, value):
    given = [{"input_ids": SHORT, name: value}, {"input_ids": SHORT, name: value}]
    with pytest.raises(BatchError) as caught:
        together(given, "left", 0)
    assert str(caught.value) == NO_ROWS.format(name)


def test_a_keyword_of_one_input_alone_is_refused_where_nothing_stands_for_it_elsewhere():
    given = ids(short={"head_mask": torch.ones(1, 2)})
    with pytest.raises(BatchError) as caught:
        together(given, "left", 0)
    assert str(caught.value) == "`head_mask` is given for some inputs only, not for input 2.\nGive it for each input."


def test_ids_beside_embeddings_are_refused():
    with pytest.raises(BatchError) as caught:
        together([{"input_ids": SHORT}, {"inputs_embeds": torch.ones(1, 2, 3)}], "left", 0)
    assert str(caught.value) == (
        "Input 1 gives `input_ids` and input 2 `inputs_embeds`; one call takes only one of them.\n"
        "Embed the ids first (`inputs_embeds=model.get_input_embeddings()(ids)`), or use `model.trace(batched=False)`."
    )


def test_an_input_without_content_is_refused():
    with pytest.raises(BatchError) as caught:
        together([{"input_ids": SHORT}, {"attention_mask": SHORT}], "left", 0)
    assert str(caught.value) == (
        "Input 2 gives neither text nor `input_ids` nor `inputs_embeds`.\nGive each invoke what it runs on."
    )


def test_different_lengths_and_no_token_to_pad_with_are_refused():
    with pytest.raises(PaddingError) as caught:
        together(ids(), "left", None)
    assert str(caught.value) == (
        "The inputs have 2 to 4 tokens, and there is no token to pad with.\n"
        "Set `model.tokenizer.pad_token`, or pass inputs of one length."
    )


def test_values_that_differ_in_other_dimensions_are_refused():
    with pytest.raises(BatchError) as caught:
        together([{"inputs_embeds": torch.ones(1, 2, 3)}, {"inputs_embeds": torch.ones(1, 2, 5)}], "left", 0)
    assert str(caught.value) == (
        "`inputs_embeds` of the inputs cannot be put into one batch: [1, 2, 3], [1, 2, 5].\n"
        "Give every input the same shape but for the first two dimensions."
    )


# On models


def real(logits, length, side):
    return logits[:, -length:] if side == "left" else logits[:, :length]


def close(one, other):
    return one.shape == other.shape and torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("form", ["text", "ids", "lists", "tensors", "embeddings", "mixed"])
def test_the_logits_of_each_row_are_those_of_its_prompt_alone(folder, kind, form):
    model = LanguageModel(folder(kind)).dispatch()
    module, side = model._module, "right" if kind == "bert" else "left"
    head = model.cls if kind == "bert" else model.lm_head
    tokens = [model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    embed = module.get_input_embeddings()
    forms = {
        "text": PROMPTS,
        "ids": tokens,
        "lists": [[each] for each in tokens],
        "tensors": [torch.tensor([each]) for each in tokens],
        "embeddings": [embed(torch.tensor([each])).detach() for each in tokens],
        "mixed": [PROMPTS[0], tokens[1], {"input_ids": torch.tensor([tokens[2]])}],
    }
    with model.trace() as tracer:
        logits = [tracer.invoke(each, lambda: head.output) for each in forms[form]]
    for invoke, row in zip(logits, tokens, strict=True):
        assert close(real(invoke.result, len(row), side), module(torch.tensor([row])).logits)


def test_a_list_of_prompts_in_one_invoke_is_as_many_rows(gpt2):
    with gpt2.trace() as tracer:
        two = tracer.invoke(PROMPTS[:2], lambda: gpt2.lm_head.output)
        one = tracer.invoke(PROMPTS[2], lambda: gpt2.lm_head.output)
    for logits, prompt in zip([*two.result, *one.result], PROMPTS, strict=True):
        row = gpt2.tokenizer(prompt, return_tensors="pt")["input_ids"]
        assert close(logits[None, -row.shape[1] :], gpt2._module(row).logits)


def test_rows_that_an_input_has_masked_itself_compute_what_they_compute_alone(gpt2):
    row, mask = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[0, 0, 1, 1]])
    with gpt2.trace() as tracer:
        masked = tracer.invoke(input_ids=row, attention_mask=mask)(lambda: gpt2.lm_head.output)
        longer = tracer.invoke(torch.tensor([[7, 8, 9, 10, 11, 12]]))(lambda: gpt2.lm_head.output)
    assert close(masked.result[:, -2:], gpt2._module(row[:, 2:]).logits)
    assert close(longer.result, gpt2._module(torch.tensor([[7, 8, 9, 10, 11, 12]])).logits)


def test_the_loss_of_labels_counts_no_padding(gpt2):
    rows = [torch.tensor([[3, 4, 5]]), torch.tensor([[6, 7, 8, 9, 10]])]
    with gpt2.trace() as tracer:
        for row in rows:
            tracer.invoke(input_ids=row, labels=row)(lambda: None)
    counts = [row.shape[1] - 1 for row in rows]
    losses = [gpt2._module(row, labels=row).loss for row in rows]
    want = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert torch.allclose(tracer.result.loss, want, atol=1e-5)


def test_token_types_of_each_input_reach_its_rows(folder):
    model = LanguageModel(folder("bert")).dispatch()
    given = [(torch.tensor([[3, 4, 5]]), torch.tensor([[0, 1, 1]])), (torch.tensor([[6, 7, 8, 9, 10]]), None)]
    with model.trace() as tracer:
        logits = [
            tracer.invoke(input_ids=row, **({} if types is None else {"token_type_ids": types}))(lambda: model.cls.output)
            for row, types in given
        ]
    for invoke, (row, types) in zip(logits, given, strict=True):
        assert close(invoke.result[:, : row.shape[1]], model._module(row, token_type_ids=types).logits)


def test_positions_of_each_input_reach_its_rows(gpt2):
    shifted = torch.tensor([[10, 11, 12]])
    rows = [torch.tensor([[3, 4, 5]]), torch.tensor([[6, 7, 8, 9, 10]])]
    with gpt2.trace() as tracer:
        first = tracer.invoke(input_ids=rows[0], position_ids=shifted)(lambda: gpt2.lm_head.output)
        second = tracer.invoke(rows[1])(lambda: gpt2.lm_head.output)
    assert close(first.result[:, -3:], gpt2._module(rows[0], position_ids=shifted).logits)
    assert not close(first.result[:, -3:], gpt2._module(rows[0]).logits)
    assert close(second.result, gpt2._module(rows[1]).logits)


def test_what_an_encoder_and_a_decoder_are_given_reach_their_rows(folder):
    model = LanguageModel(folder("t5")).dispatch()
    given = [
        (torch.tensor([[3, 4, 5]]), torch.tensor([[0, 9, 8, 7]])),
        (torch.tensor([[6, 7, 8, 9, 10]]), torch.tensor([[0, 5]])),
    ]
    with model.trace() as tracer:
        logits = [
            tracer.invoke(input_ids=row, decoder_input_ids=decoded)(lambda: model.lm_head.output) for row, decoded in given
        ]
    for invoke, (row, decoded) in zip(logits, given, strict=True):
        assert close(invoke.result[:, : decoded.shape[1]], model._module(row, decoder_input_ids=decoded).logits)
    with model.trace() as tracer:
        started = [tracer.invoke(row, lambda: model.lm_head.output) for row, _ in given]
    for invoke, (row, _) in zip(started, given, strict=True):
        assert close(invoke.result, model._module(row, decoder_input_ids=torch.tensor([[0]])).logits)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_each_row_generates_what_its_prompt_generates_alone(folder, kind):
    model = LanguageModel(folder(kind)).dispatch()
    with model.generate(max_new_tokens=4, do_sample=False) as tracer:
        for prompt in PROMPTS:
            tracer.invoke(prompt, lambda: None)
    for row, prompt in zip(tracer.result, PROMPTS, strict=True):
        encoded = model.tokenizer(prompt, return_tensors="pt")
        alone = model._module.generate(**encoded, max_new_tokens=4, do_sample=False, pad_token_id=0)[0]
        if kind == "t5":
            assert row.tolist()[: len(alone)] == alone.tolist()
        else:
            assert row[-4:].tolist()[: len(alone) - encoded["input_ids"].shape[1]] == alone[-4:].tolist()


@pytest.mark.parametrize(("name", "value"), [("output_hidden_states", True), ("max_new_tokens", 3)])
def test_a_keyword_without_rows_is_refused_in_an_invoke_and_taken_by_the_trace(gpt2, name, value):
    open_trace = gpt2.trace if name == "output_hidden_states" else gpt2.generate
    with pytest.raises(BatchError) as caught, open_trace() as tracer:
        tracer.invoke(PROMPTS[0], lambda: None)
        tracer.invoke(PROMPTS[1], **{name: value})(lambda: None)
    assert str(caught.value) in (
        NO_ROWS.format(name),
        f"`{name}` is given for some inputs only, not for input 1.\nGive it for each input.",
    )
    with open_trace(**{name: value}) as tracer:
        hidden = [tracer.invoke(prompt, lambda: gpt2.transformer.h[0].hidden.shape[0]) for prompt in PROMPTS]
    assert [each.result for each in hidden] == [1, 1, 1]
