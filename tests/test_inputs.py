"""What may be passed to a language model, and what is refused before it runs."""

import pickle

import pytest
import torch

import nnsight_eager
from nnsight_eager import LanguageModel

PROMPT = "The Eiffel Tower is in the city of"
SHORT = "Mary"


@pytest.fixture
def ids(gpt2):
    return gpt2.tokenizer(PROMPT)["input_ids"]


@pytest.fixture
def logits(gpt2, ids):
    """The model's own answer, without this package's input handling."""
    return gpt2.dispatch()._module(input_ids=torch.tensor([ids])).logits


def test_every_form_of_one_prompt_gives_the_same_answer(gpt2, ids, logits):
    encoding = gpt2.tokenizer(PROMPT, return_tensors="pt")
    embeddings = gpt2._module.transformer.wte(torch.tensor([ids]))
    forms = [
        ((PROMPT,), {}),
        (([PROMPT],), {}),
        ((ids,), {}),
        (([ids],), {}),
        ((tuple(ids),), {}),
        ((torch.tensor(ids),), {}),
        ((torch.tensor([ids]),), {}),
        (([torch.tensor(ids)],), {}),
        ((encoding,), {}),
        ((dict(encoding),), {}),
        ((gpt2.tokenizer(PROMPT),), {}),
        ((embeddings,), {}),
        ((), {"input_ids": torch.tensor([ids])}),
        ((), {"input_ids": ids}),
        ((), {"inputs_embeds": embeddings}),
        ((PROMPT,), {"attention_mask": [1] * len(ids)}),
    ]
    for given, keywords in forms:
        assert torch.allclose(gpt2.trace(*given, **keywords).result.logits, logits, atol=1e-5), (given, keywords)


def test_other_keywords_go_to_the_call(gpt2):
    assert len(gpt2.trace(PROMPT, output_hidden_states=True).result.hidden_states) == 4


def test_chat_messages_go_through_the_chat_template(gpt2):
    turns = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    gpt2.tokenizer.chat_template = turns + "{% if add_generation_prompt %}assistant:{% endif %}"
    try:
        asked = [{"role": "user", "content": "Where is Rome?"}]
        text = "user: Where is Rome?\nassistant:"
        assert torch.equal(gpt2.trace(asked).result.logits, gpt2.trace(text).result.logits)
        assert gpt2.trace([asked, asked]).result.logits.shape[0] == 2
        answered = [*asked, {"role": "assistant", "content": "In"}]
        assert torch.equal(gpt2.trace(answered).result.logits, gpt2.trace("user: Where is Rome?\nassistant: In").result.logits)
    finally:
        gpt2.tokenizer.chat_template = None


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_short_prompt_in_a_causal_batch_gives_its_solo_result(folder, kind):
    model = LanguageModel(folder(kind), dtype=torch.float64)
    both = model.trace([PROMPT, SHORT]).result.logits
    for row, prompt in enumerate([PROMPT, SHORT]):
        solo = model.dispatch()._module(**model.tokenizer(prompt, return_tensors="pt")).logits[0]
        assert torch.allclose(both[row, -len(solo) :], solo, atol=1e-10)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_a_short_prompt_in_an_encoder_batch_gives_its_solo_result(folder, kind):
    model = LanguageModel(folder(kind), dtype=torch.float64)
    extra = {"decoder_input_ids": torch.tensor([[0]])} if kind == "t5" else {}
    both = model.trace([PROMPT, SHORT]).result.logits
    for row, prompt in enumerate([PROMPT, SHORT]):
        encoded = model.tokenizer(prompt, return_tensors="pt")
        solo = model.dispatch()._module(**encoded, **extra).logits[0]
        assert torch.allclose(both[row, : len(solo)], solo, atol=1e-10)


def test_id_rows_of_several_lengths_are_padded_as_text_is(gpt2):
    rows = [gpt2.tokenizer(each)["input_ids"] for each in (PROMPT, SHORT)]
    assert torch.equal(gpt2.trace(rows).result.logits, gpt2.trace([PROMPT, SHORT]).result.logits)


def test_a_padded_batch_generates_what_each_prompt_generates(gpt2):
    both = gpt2.generate([PROMPT, SHORT], max_new_tokens=4, do_sample=False).result
    for row, prompt in enumerate([PROMPT, SHORT]):
        encoded = gpt2.tokenizer(prompt, return_tensors="pt")
        solo = gpt2._module.generate(**encoded, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert both[row, -4:].tolist() == solo[0, -4:].tolist()


REFUSED = [
    ("", "EmptyInputError", "The input has no tokens: ''."),
    ([], "EmptyInputError", "The input has no tokens: []."),
    ([[]], "EmptyInputError", "The input has no tokens: [[]]."),
    ([PROMPT, ""], "EmptyInputError", "The input has no tokens: ''."),
    (torch.zeros(1, 0, dtype=torch.long), "EmptyInputError", "The input has no tokens: a tensor of shape [1, 0]."),
    (None, "EmptyInputError", "The model was given `None` to run on."),
    (3.5, "InputError", "The model was given `float`, which is not an input it knows."),
    ([1.5], "InputError", "The model was given `list`, which is not an input it knows."),
    ([PROMPT, 3], "InputError", "The model was given `int`, which is not an input it knows."),
    (
        {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[1]])},
        "MaskError",
        "`attention_mask` has shape [1, 1]; the input is [1, 2] ([batch, seq]).",
    ),
    ({"inputs_embeds": torch.zeros(1, 0, 32)}, "InputError", "The input has no tokens: a tensor of shape [1, 0, 32]."),
    ([[1, 2], ["three"]], "InputError", "The model was given `list`, which is not an input it knows."),
    (
        [{"role": "user", "content": "x"}],
        "InputError",
        "The model was given chat messages, and its tokenizer has no chat template.",
    ),
]


@pytest.mark.parametrize(("given", "error", "sentence"), REFUSED)
@pytest.mark.parametrize("call", ["trace", "generate"])
def test_what_cannot_be_run_is_a_sentence_of_its_own_before_the_model_runs(gpt2, given, error, sentence, call):
    with pytest.raises(getattr(nnsight_eager, error)) as caught:
        getattr(gpt2, call)(given)
    assert str(caught.value).splitlines()[0] == sentence
    assert len(str(caught.value).splitlines()) == 2
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_no_input_at_all_is_a_sentence(gpt2):
    with pytest.raises(nnsight_eager.InputError) as caught, gpt2.trace():
        pass
    assert str(caught.value).splitlines()[0] == "The trace has no input."


def test_an_input_given_twice_is_a_sentence(gpt2, ids):
    with pytest.raises(nnsight_eager.InputError, match="takes one of them"):
        gpt2.trace(PROMPT, input_ids=torch.tensor([ids]))
    with pytest.raises(nnsight_eager.InputError, match="was given 2 inputs"):
        gpt2.trace(PROMPT, SHORT)


def test_text_without_a_tokenizer_is_a_sentence_and_ids_are_not(gpt2, ids, logits):
    bare = LanguageModel(gpt2._module)
    with pytest.raises(nnsight_eager.TokenizerMissingError) as caught:
        bare.trace(PROMPT)
    assert str(caught.value).splitlines()[0] == "The model was given text, and it has no tokenizer."
    assert torch.allclose(bare.trace([ids]).result.logits, logits, atol=1e-5)


def test_several_lengths_without_anything_to_pad_with_are_a_sentence(gpt2, ids):
    bare = LanguageModel(gpt2._module)
    with pytest.raises(nnsight_eager.PaddingError) as caught:
        bare.trace([ids, ids[:3]])
    happened = f"The inputs have 3 to {len(ids)} tokens, and there is no token to pad with."
    assert str(caught.value).splitlines()[0] == happened


def test_text_is_cut_as_the_tokenizer_is_told(gpt2):
    ids = gpt2.tokenizer(PROMPT)["input_ids"]
    with gpt2.trace(PROMPT, truncation=True, max_length=3):
        one = gpt2.transformer.wte.input
    with gpt2.trace([PROMPT, SHORT], truncation=True, max_length=3):
        several = gpt2.transformer.wte.input
    with gpt2.trace(truncation=True, max_length=3) as tracer:
        with tracer.invoke(PROMPT):
            shared = gpt2.transformer.wte.input
        with tracer.invoke(PROMPT, max_length=2):
            own = gpt2.transformer.wte.input[:, -2:]
    assert one.tolist() == shared.tolist() == [ids[:3]]
    assert several[0].tolist() == ids[:3]
    assert own.tolist() == [ids[:2]]


def test_generations_own_max_length_is_generations(gpt2):
    length = len(gpt2.tokenizer(PROMPT)["input_ids"])
    assert gpt2.generate(PROMPT, max_length=length + 2).result.shape == (1, length + 2)


def test_the_tokenizers_keywords_without_text_are_refused(gpt2):
    for given in ([1, 2, 3], torch.tensor([[1, 2]])):
        with pytest.raises(nnsight_eager.InputError, match=r"`truncation=` is for the tokenizer"):
            gpt2.trace(given, truncation=True)
    with pytest.raises(nnsight_eager.InputError, match=r"`truncation=` is for the tokenizer"):
        gpt2.trace(input_ids=torch.tensor([[1, 2]]), truncation=True)
