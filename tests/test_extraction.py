"""The activations of a data set: what is stored is what plain hooks see, and a kill changes no bit of it."""

import io
import json
import os
import random
from pathlib import Path

import pytest
import torch
from small_models import hooked, run_python

import nnsight_eager.progress
from nnsight_eager import (
    Activations,
    EmptyInputError,
    ExtractError,
    InputError,
    LanguageModel,
    PathError,
    TokenizerMissingError,
)

TEXTS = [
    "The Eiffel Tower is in the city of",
    "Rome",
    "Madison square garden is located in the city of New York City, and John gave a drink to Mary.",
    "When Mary and John went to the store",
    "to Mary 0123",
]
LAYERS = {"gpt2": "transformer.h.*", "llama": "model.layers.*", "bert": "bert.encoder.layer.*", "t5": "encoder.block.*"}


def model_of(folder, kind):
    return LanguageModel(folder(kind), dispatch=True)


def files(folder):
    return {each.name: each.read_bytes() for each in sorted(Path(folder).iterdir())}


def told(error):
    """The two lines of an error that was caught."""
    return str(error.value).splitlines()


# What is stored


@pytest.mark.parametrize("kind", LAYERS)
def test_each_text_has_what_plain_hooks_see_when_it_runs_alone(folder, tmp_path, kind):
    model = LanguageModel(folder(kind), dtype=torch.float64, dispatch=True)  # of float32 the last digits depend on the batch
    activations = model.extract(TEXTS, [LAYERS[kind]], tmp_path / "out", batch_tokens=60)
    assert len(activations) == len(TEXTS)
    for text, stored in zip(TEXTS, activations, strict=True):
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        extra = {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)} if kind == "t5" else {}
        with torch.no_grad():
            seen = hooked(model._module, lambda ids=ids, extra=extra: model._module(ids, **extra), *activations.points)
        assert torch.equal(stored.tokens, ids[0])
        for path, (value,) in zip(activations.points, seen, strict=True):
            hidden = value[0] if isinstance(value, tuple) else value
            torch.testing.assert_close(stored[path], hidden[0], atol=1e-10, rtol=1e-10)


def test_shards_hold_every_token_once_with_its_row_and_position(gpt2, tmp_path):
    activations = gpt2.extract(TEXTS, "transformer.h.*", tmp_path, batch_tokens=60, shard_bytes=8_000)
    shards = list(activations.shards())
    assert len(shards) > 1
    found = {}
    for shard in shards:
        values = shard["transformer.h.1"]
        assert len(shard) == len(values) == len(shard.rows) == len(shard.positions) == len(shard.tokens)
        for place, key in enumerate(zip(shard.rows.tolist(), shard.positions.tolist(), strict=True)):
            assert key not in found
            found[key] = shard.tokens[place], values[place]
    assert len(found) == sum(activations.lengths)
    for row, part in enumerate(activations):
        assert part.rows.tolist() == [row] * len(part)
        assert part.positions.tolist() == list(range(len(part)))
        for position, token in enumerate(part.tokens):
            assert found[row, position][0] == token
            assert torch.equal(found[row, position][1], part["transformer.h.1"][position])


class DataSet:
    """Rows as the `datasets` library gives them."""

    column_names = ("text", "label")

    def __len__(self):
        return len(TEXTS)

    def __getitem__(self, row):
        return {"text": TEXTS[range(len(TEXTS))[row]], "label": 1}


class NoEnd(DataSet):
    """A data set that has a length, and does not say where it ends."""

    def __getitem__(self, row):
        assert row < len(TEXTS), "asked for a row that is not there"
        return super().__getitem__(row)


def test_a_data_set_may_have_texts_ids_and_dicts(gpt2, tmp_path):
    ids = gpt2.tokenizer(TEXTS)["input_ids"]
    kinds = {
        "texts": TEXTS,
        "ids": ids,
        "tensors": [torch.tensor(row) for row in ids],
        "text": [{"text": text, "label": 1} for text in TEXTS],
        "tokenized": [{"text": "other", "input_ids": row} for row in ids],
        "data set": DataSet(),
        "no end": NoEnd(),
        "mixed": [TEXTS[0], ids[1], {"text": TEXTS[2]}, {"input_ids": ids[3]}, tuple(ids[4])],
    }
    for name, given in kinds.items():
        gpt2.extract(given, ["transformer.h.0"], tmp_path / name)
        assert files(tmp_path / name) == files(tmp_path / "texts"), name
    gpt2.extract([{"story": text} for text in TEXTS], ["transformer.h.0"], tmp_path / "column", column="story")
    assert files(tmp_path / "column") == files(tmp_path / "texts")


def test_floating_point_values_are_stored_in_the_dtype_that_is_asked(gpt2, tmp_path):
    plain = gpt2.extract(TEXTS, ["transformer.h.1"], tmp_path / "plain")[0]["transformer.h.1"]
    for dtype in (torch.float16, torch.bfloat16):
        stored = gpt2.extract(TEXTS, ["transformer.h.1"], tmp_path / str(dtype), dtype=dtype)
        assert torch.equal(stored[0]["transformer.h.1"], plain.to(dtype))
        assert stored.points["transformer.h.1"].torch_dtype is dtype


def test_points_are_named_as_for_a_cache_and_read_by_path(gpt2, tmp_path):
    activations = gpt2.extract(TEXTS, [gpt2.lm_head, "transformer.wte", gpt2], tmp_path)
    assert list(activations.points) == ["transformer.wte", "lm_head", ""]  # as the model comes by them
    assert torch.equal(activations[1]["model.lm_head"], activations[1][""])
    with pytest.raises(ExtractError) as caught:
        activations[1]["lm_haed"]
    assert told(caught)[0] == "Nothing is stored of `lm_haed`; did you mean `lm_head`?"


def test_edits_are_in_what_is_stored(gpt2, tmp_path):
    plain = gpt2.extract(TEXTS, ["transformer.h.1"], tmp_path / "plain")
    with gpt2.ablate(gpt2.transformer.h[1]):
        ablated = gpt2.extract(TEXTS, ["transformer.h.1"], tmp_path / "ablated")
        with pytest.raises(ExtractError, match="with other edits"):
            gpt2.extract(TEXTS, ["transformer.h.1"], tmp_path / "plain")
    assert not ablated[0]["transformer.h.1"].any()
    assert plain[0]["transformer.h.1"].any()


def test_steering_by_another_vector_is_another_request(gpt2, tmp_path):
    layer, vector = gpt2.transformer.h[0], torch.arange(32.0)
    other = vector.clone()
    other[17] += 1e-3
    with gpt2.steer(layer, vector, scale=2, positions=[0]):
        gpt2.extract(TEXTS, ["transformer.h.1"], tmp_path)
    for changed in ({"vector": other}, {"scale": 3}, {"positions": [1]}, {"vector": vector.double()}):
        given = {"vector": vector, "scale": 2, "positions": [0]} | changed
        with gpt2.steer(layer, **given), pytest.raises(ExtractError, match="with other edits"):
            gpt2.extract(TEXTS, ["transformer.h.1"], tmp_path)
    with gpt2.steer(layer, vector, scale=2, positions=[0]):
        gpt2.extract(TEXTS, ["transformer.h.1"], tmp_path)


@pytest.mark.parametrize("way", ["function", "block"])
def test_an_edit_that_sees_another_value_is_another_request(gpt2, tmp_path, way):
    def extract(scale):
        def change():
            gpt2.transformer.h[0].hidden *= scale

        if way == "function":
            edited = gpt2.edit(change)
        else:
            with gpt2.edit() as edited:
                gpt2.transformer.h[0].hidden *= scale
        return edited.extract(TEXTS, ["transformer.h.0"], tmp_path)

    first = extract(1.0)
    assert torch.equal(extract(1.0)[0]["transformer.h.0"], first[0]["transformer.h.0"])
    with pytest.raises(ExtractError, match="with other edits"):
        extract(2.0)


def test_a_value_that_the_model_changes_later_is_stored_as_it_was(tmp_path):
    class Changing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(9, 4)
            self.last = torch.nn.Identity()

        def forward(self, input_ids, attention_mask=None):
            return self.last(self.embed(input_ids).mul_(0))

    model = LanguageModel(Changing())
    activations = model.extract([[1, 2], [3, 4]], ["embed", "last"], tmp_path)
    assert torch.equal(activations[1]["embed"], model._module.embed.weight[[3, 4]])


# How it runs


def test_batches_have_at_most_the_tokens_that_are_asked(gpt2, tmp_path):
    shapes = []
    wte = gpt2.dispatch()._module.transformer.wte
    handle = wte.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    draw = random.Random(0)
    rows = [[draw.randrange(1, 300) for _ in range(draw.randrange(1, 50))] for _ in range(40)]
    gpt2.extract(rows, ["transformer.h.0"], tmp_path, batch_tokens=48)
    handle.remove()
    survey, *batches = shapes
    assert survey == (1, 13)  # of one text, which are enough to tell the shapes
    assert all(batch * seq <= 48 or batch == 1 for batch, seq in batches)
    assert sum(batch for batch, _ in batches) == len(rows)
    assert len(batches) < len(rows) * 0.7
    assert [seq for _, seq in batches] == sorted((seq for _, seq in batches), reverse=True)


def test_the_forward_is_stopped_behind_the_last_point(gpt2, tmp_path):
    ran = []
    blocks = gpt2.dispatch()._module.transformer.h
    handles = [each.register_forward_pre_hook(lambda *_, n=n: ran.append(n)) for n, each in enumerate(blocks)]
    gpt2.extract(TEXTS, ["transformer.h.0", "transformer.h.1"], tmp_path, batch_tokens=1)
    for handle in handles:
        handle.remove()
    survey, rest = ran[:3], ran[3:]
    assert survey == [0, 1, 2]
    assert rest == [0, 1] * len(TEXTS)


def test_afterwards_the_model_is_as_it_was(gpt2, tmp_path):
    gpt2.dispatch()
    before = [dict(each.__dict__) for each in gpt2._module.modules()]
    gpt2.extract(TEXTS, ["transformer.h.1"], tmp_path)
    after = [dict(each.__dict__) for each in gpt2._module.modules()]
    assert after == before
    assert torch.is_grad_enabled()


def test_progress_is_shown_where_it_takes_long_and_only_there(gpt2, tmp_path, monkeypatch):
    gpt2.dispatch()  # transformers shows the loading
    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    gpt2.extract(TEXTS, ["transformer.h.1"], tmp_path / "short")
    assert shown.getvalue() == ""
    monkeypatch.setattr(nnsight_eager.progress, "PATIENCE", 0)
    total = sum(gpt2.extract(TEXTS, ["transformer.h.1"], tmp_path / "long", batch_tokens=20).lengths)
    assert f"{total} of {total} tokens" in " ".join(shown.getvalue().split())


# Going on


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
def test_killed_while_writing_and_at_random_moments_it_goes_on_to_the_same_bits(tmp_path):
    run_python(Path(__file__).with_name("extracting.py"), tmp_path, 7, seconds=900)  # seconds, where nothing else runs
    assert (tmp_path / "half_written").read_text() == "10"  # else a kill did not meet the writing
    whole = files(tmp_path / "whole")
    assert len(whole) > 10
    for number in range(10):
        assert files(tmp_path / str(number)) == whole


def test_what_is_finished_is_read_and_the_model_does_not_run(gpt2, tmp_path):
    first = gpt2.extract(TEXTS, ["transformer.h.1"], tmp_path)
    before = files(tmp_path)
    handle = gpt2._module.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    again = gpt2.extract(TEXTS, ["transformer.h.1"], tmp_path)
    handle.remove()
    assert files(tmp_path) == before
    assert repr(again) == repr(first)


def test_only_what_is_missing_is_made_again(gpt2, tmp_path):
    def extract():
        return gpt2.extract(TEXTS, ["transformer.h.1"], tmp_path, batch_tokens=1, shard_bytes=1)

    extract()
    before = files(tmp_path)
    (tmp_path / "shard-00003.safetensors").unlink()
    (tmp_path / "shard-00001.safetensors.part").write_bytes(b"half")
    with pytest.raises(ExtractError) as caught:
        Activations(tmp_path)
    assert told(caught) == [
        f"`{tmp_path}` is not finished: 1 of 5 shards are missing.",
        "Call `model.extract` again as it was called; it goes on where it was.",
    ]
    ran = []
    handle = gpt2._module.transformer.wte.register_forward_pre_hook(lambda *_: ran.append(1))
    extract()
    handle.remove()
    assert len(ran) == 1
    assert files(tmp_path) == before


def test_another_request_for_the_same_folder_is_refused(gpt2, folder, tmp_path):
    def extract(model=gpt2, texts=TEXTS, points=("transformer.h.1",), **options):
        model.extract(texts, list(points), tmp_path, **options)

    extract()
    trained = model_of(folder, "gpt2")
    with torch.no_grad():
        trained._module.transformer.h[0].ln_1.weight += 0.1
    others = {
        "texts": {"texts": TEXTS[1:]},
        "points": {"points": ["transformer.h.0"]},
        "dtype": {"dtype": torch.float16},
        "batch_tokens": {"batch_tokens": 7},
        "shard_bytes": {"shard_bytes": 7},
        "weights": {"model": trained},
    }
    for name, other in others.items():
        with pytest.raises(ExtractError) as caught:
            extract(**other)
        assert told(caught) == [
            f"`{tmp_path}` holds the activations of another request, with other {name}.",
            "Give another folder, or remove this one.",
        ]
    extract()


def test_two_processes_do_not_write_at_the_same_folder(gpt2, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ExtractError) as caught:
            gpt2.extract(TEXTS, ["transformer.h.1"], tmp_path)
    assert told(caught)[0] == f"Another process is extracting to `{tmp_path}`."
    gpt2.extract(TEXTS, ["transformer.h.1"], tmp_path)


# What is refused


class Table:
    """A data frame: going over it gives the names of its columns."""

    columns = ("text",)

    def __iter__(self):
        return iter(self.columns)


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"texts": []}, EmptyInputError, "The data set has no texts."),
        ({"texts": ["a", ""]}, EmptyInputError, "Row 1 of the data set has no tokens: ''."),
        ({"texts": [[1], []]}, EmptyInputError, "Row 1 of the data set has no tokens: []."),
        ({"texts": "The Eiffel"}, InputError, "The data set is a `str`, which is no sequence of rows."),
        ({"texts": {"text": ["a"]}}, InputError, "The data set is a `dict`, which is no sequence of rows."),
        ({"texts": Table()}, InputError, "The data set is a `Table`, which is no sequence of rows."),
        ({"texts": 3}, InputError, "The data set is a `int`, which is no sequence of rows."),
        ({"texts": ["a", None]}, InputError, "Row 1 of the data set is a `NoneType`, which is neither a text nor token ids."),
        ({"texts": [[1], [0.5]]}, InputError, "Row 1 of the data set is a `list`, which is neither a text nor token ids."),
        (
            {"texts": torch.ones(2, 1, 3).long()},
            InputError,
            "Row 0 of the data set is a `Tensor`, which is neither a text nor token ids.",
        ),
        ({"max_length": 0}, InputError, "`max_length` was given 0."),
        ({"texts": [{"story": "a"}]}, InputError, "Row 0 of the data set has no `text` or `input_ids`; it has `story`."),
        ({"texts": [{"text": "a"}], "column": "b"}, InputError, "Row 0 of the data set has no `b`; it has `text`."),
        ({"texts": [[1], [1] * 129]}, InputError, "Row 1 of the data set has 129 tokens; the model has 128 positions."),
        ({"points": []}, ExtractError, "There are no points to extract."),
        ({"points": None}, ExtractError, "There are no points to extract."),
        ({"points": ["h.*"]}, PathError, "`h.*` names no module of `GPT2LMHeadModel`."),
        ({"batch_tokens": 0}, ExtractError, "`batch_tokens` was given 0."),
        ({"shard_bytes": 1.5}, ExtractError, "`shard_bytes` was given 1.5."),
        ({"dtype": torch.int8}, ExtractError, "`dtype` was given torch.int8."),
    ],
)
def test_what_cannot_be_extracted_is_a_sentence_before_anything_runs(gpt2, tmp_path, given, error, sentence):
    handle = gpt2.dispatch()._module.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(error) as caught:
        gpt2.extract(**{"texts": TEXTS, "points": ["transformer.h.1"], "out": tmp_path / "out", **given})
    handle.remove()
    assert told(caught)[0] == sentence
    assert len(told(caught)) == 2
    assert not (tmp_path / "out").exists()


def test_long_texts_may_be_cut(gpt2, folder, tmp_path):
    activations = gpt2.extract([[5] * 200, [6] * 3], ["transformer.h.1"], tmp_path / "ids", max_length=9)
    assert activations.lengths == [9, 3]
    bert = model_of(folder, "bert")
    cut = bert.extract(TEXTS, ["bert.encoder.layer.1"], tmp_path / "texts", max_length=6)
    assert cut[2].tokens.tolist() == bert.tokenizer(TEXTS[2], truncation=True, max_length=6)["input_ids"]


def test_texts_without_a_tokenizer_are_refused(gpt2, tmp_path):
    model = LanguageModel(gpt2.dispatch()._module)
    with pytest.raises(TokenizerMissingError) as caught:
        model.extract(TEXTS, ["transformer.h.1"], tmp_path)
    assert told(caught)[0] == "The data set has texts, and the model has no tokenizer."
    assert model.extract([[1, 2]], ["transformer.h.1"], tmp_path)[0].tokens.tolist() == [1, 2]


class Odd(torch.nn.Module):
    """Modules that do not give one value for each token."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(9, 4)
        self.flat = torch.nn.Flatten(0, 1)
        self.twice = torch.nn.Identity()
        self.unused = torch.nn.Identity()
        self.none = Nothing()
        self.experts = torch.nn.ModuleList([torch.nn.Identity()])
        self.square = Square()

    def forward(self, input_ids, attention_mask=None):
        hidden = self.experts[0](self.twice(self.twice(self.embed(input_ids))))
        self.none(hidden)
        self.square(hidden)
        return self.flat(hidden)


class Nothing(torch.nn.Module):
    def forward(self, hidden):
        return None


class Square(torch.nn.Module):
    def forward(self, hidden):
        return hidden @ hidden.transpose(1, 2)


@pytest.mark.parametrize(
    ("point", "sentence"),
    [
        ("flat", "`model.flat` gives [3, 4] float32 for tokens [1, 3] ([batch, seq]), so it has no value for each token."),
        ("none", "`model.none` gives no tensor for tokens [1, 3] ([batch, seq]), so it has no value for each token."),
        (
            "square",
            "`model.square` gives [1, 2, 2] float32 for tokens [1, 2] ([batch, seq]), so it has no value for each token.",
        ),
        ("twice", "`model.twice` runs 2 times in a forward pass, so it has no one value for each token."),
        ("unused", "`model.unused` runs 0 times in a forward pass, so it has no one value for each token."),
        ("experts.0", "`model.experts[0]` is an expert of a mixture: it gets some tokens only, and not in their places."),
    ],
)
def test_a_point_without_a_value_for_each_token_is_refused_by_its_name(tmp_path, point, sentence):
    with pytest.raises(ExtractError) as caught:
        LanguageModel(Odd()).extract([[1, 2, 3], [4, 5]], [point], tmp_path / "out", batch_tokens=3)
    assert told(caught)[0] == sentence


def test_folders_that_hold_no_activations_are_refused(gpt2, tmp_path):
    with pytest.raises(ExtractError, match="holds no activations"):
        Activations(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ExtractError, match="is a file"):
        gpt2.extract(TEXTS, ["transformer.h.1"], tmp_path / "file")
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ExtractError, match="is not the index of an extraction"):
        Activations(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"version": 0}))
    with pytest.raises(ExtractError, match="by another version"):
        gpt2.extract(TEXTS, ["transformer.h.1"], tmp_path)
    (tmp_path / "index.json").unlink()
    (tmp_path / "shard-00000.safetensors").write_bytes(b"")
    with pytest.raises(ExtractError, match=r"has shards and no `index.json`"):
        gpt2.extract(TEXTS, ["transformer.h.1"], tmp_path)


# Reading back


def test_reading_is_by_row_from_either_end(gpt2, tmp_path):
    activations = gpt2.extract(TEXTS, ["transformer.h.1"], tmp_path)
    assert torch.equal(activations[-1]["transformer.h.1"], activations[4]["transformer.h.1"])
    with pytest.raises(IndexError, match=r"There are 5 texts; there is no \[5\]"):
        activations[5]


def test_what_is_read_is_mapped_and_the_files_do_not_change_with_it(gpt2, tmp_path):
    activations = gpt2.extract(TEXTS, ["transformer.h.1"], tmp_path)
    before = files(tmp_path)
    value = activations[0]["transformer.h.1"]
    whole = next(activations.shards())["transformer.h.1"]
    assert value.untyped_storage().nbytes() > value.nbytes  # a view of the file
    value.zero_()
    whole.zero_()
    assert files(tmp_path) == before
    assert activations[0]["transformer.h.1"].any()


def test_a_folder_says_what_it_holds(gpt2, tmp_path):
    activations = gpt2.extract([[1, 2, 3], [4]], ["transformer.h.1"], tmp_path, dtype=torch.float16)
    assert repr(activations) == ("<Activations of GPT2LMHeadModel: 2 texts, 4 tokens, 0.0 MB: transformer.h.1 [32] float16>")
    assert repr(activations[0]) == "<3 tokens of shard-00000.safetensors: transformer.h.1>"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_shard_is_what_safetensors_would_have_written(gpt2, tmp_path, dtype):
    import safetensors.torch

    gpt2.extract(TEXTS, ["transformer.h.*"], tmp_path, dtype=dtype)
    for file in tmp_path.glob("*.safetensors"):
        stored = safetensors.torch.load_file(file)
        assert stored["transformer.h.1.hidden"].dtype is dtype
        assert file.read_bytes()[8:].split(b"}}")[1].lstrip() == safetensors.torch.save(stored)[8:].split(b"}}")[1].lstrip()


def test_memory_does_not_grow_with_the_data_set(gpt2, tmp_path):
    def peak(rows):
        now = most = 0
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            gpt2.extract(rows, ["transformer.h.*"], tmp_path / str(len(rows)), batch_tokens=100)
        events = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return most

    gpt2.dispatch()
    small, large = peak([[1] * 50] * 4), peak([[1] * 50] * 24)
    assert large < small * 1.02
