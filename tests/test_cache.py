"""A cache keeps what modules return, without pausing."""

from pathlib import Path

import pytest
import torch
from small_models import X4, Stack, hooked

from nnsight_eager import Cache, CacheError, NNsight, PathError


@pytest.fixture
def model():
    return NNsight(Stack())


def outputs(model, call, *names):
    return hooked(model._module, call, *names)


def test_a_cache_holds_what_plain_hooks_see(model):
    with model.trace(X4) as tracer:
        cache = tracer.cache()
    names = ["h.0", "h.0.lin", "h.1", "h.2", "head", ""]
    seen = outputs(model, lambda: model._module(X4), *names)
    for name, (expected,) in zip(names, seen, strict=True):
        assert torch.equal(cache[name].output, expected)
    assert cache.keys() == ["h.0.lin", "h.0", "h.1.lin", "h.1", "h.2.lin", "h.2", "head", ""]
    assert "unused" not in cache


def test_a_cache_sees_what_edits_have_made_of_a_value(model):
    with model.trace(X4) as tracer:
        cache = tracer.cache(include_inputs=True)
        model.h[1].lin.input = X4 * 2
        model.h[1].output = X4 * 3
        model.h[2].output.mul_(2)
        last = model.h[2].output.clone()
    assert torch.equal(cache["h.1.lin"].input, X4 * 2)
    assert torch.equal(cache["h.1"].output, X4 * 3)
    assert torch.equal(cache["h.2"].output, last)


def test_what_is_kept_is_a_copy():
    class InPlace(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Identity()

        def forward(self, x):
            return self.first(x + 0).mul_(0)

    model = NNsight(InPlace())
    assert torch.equal(model.cache(X4, modules="first")["first"].output, X4)


def test_a_container_that_the_model_fills_later_is_kept_as_it_was(gpt2):
    """A key/value cache is handed from layer to layer, and a layer's own part of it is empty before it has run."""

    class Filling(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Identity()

        def forward(self, x):
            found, names = self.first((x, [], {}))[1:]
            found.append(x)
            names["x"] = x
            return x

    _, found, names = NNsight(Filling()).cache(X4, modules="first")["first"].output
    assert (found, names) == ([], {})
    kept = gpt2.cache("The", modules="transformer.h.0", include_inputs=True)["transformer.h.0"].inputs
    (past,) = [each for each in (*kept[0], *kept[1].values()) if hasattr(each, "get_seq_length")]
    assert past.get_seq_length(0) == past.get_seq_length(1) == 0


def test_a_cache_may_begin_at_any_time_in_a_trace(model):
    with model.trace(X4) as tracer:
        model.h[1].lin.output
        cache = tracer.cache()
    assert cache.keys() == ["h.1.lin", "h.1", "h.2.lin", "h.2", "head", ""]


def test_modules_are_named_by_envoys_modules_and_patterns(model):
    chosen = ["h.*.lin", model.head, model._module.h[0]]
    assert model.cache(X4, modules=chosen).keys() == ["h.0.lin", "h.0", "h.1.lin", "h.2.lin", "head"]
    assert model.cache(X4, modules=model.h[1]).keys() == ["h.1"]


def test_a_path_that_names_no_module_is_refused_with_near_names(model):
    with pytest.raises(PathError) as caught, model.trace(X4) as tracer:
        tracer.cache(modules=["h.*.linn"])
    happened, instead = str(caught.value).splitlines()
    assert happened.startswith("`h.*.linn` names no module of `Stack`; did you mean `h.2.lin`")
    assert instead == "Give envoys, or paths as in `print(model)`, with `*` for any one name: `h.*.lin`."


def test_what_names_no_module_of_the_model_is_refused(model):
    other = NNsight(Stack())
    stale = model.h[0].lin
    model.h[0].lin = torch.nn.Linear(4, 4)
    for given in (other.h[0], other._module.h[0], stale, 3):
        with pytest.raises(PathError) as caught:
            model.cache(X4, modules=["head", given])
        assert len(str(caught.value).splitlines()) == 2
    assert NNsight(model._module.h).cache(X4, fn=lambda x: model._module(x), modules=model.h[1]).keys() == ["1"]
    renamed = NNsight(Stack(), rename={"h": "layers"})
    with pytest.raises(PathError, match=r"`layer\.1` names no module of `Stack`; did you mean `layers\.1`"):
        renamed.cache(X4, modules="layer.1")


def test_values_are_found_by_path_and_by_navigation(model):
    cache = model.cache(X4)
    for found in (cache["h.1.lin"], cache.h[1].lin, cache["model.h.1.lin"], cache.h[-2].lin):
        assert found.output is cache["h.1.lin"].output
    assert {"h", "head"} <= set(dir(cache))


def test_a_number_counted_from_the_end_that_is_not_there_is_named_as_it_was_written(model):
    cache = model.cache(X4, modules=["h.*", "head"])
    assert torch.equal(cache.h[-3].output, cache["h.0"].output)
    for missing in (lambda: cache.h[-4], lambda: cache.head[-4]):
        with pytest.raises(CacheError, match=r"^The cache has nothing of `\w+\.-4`"):
            missing()


def test_what_a_cache_does_not_hold_is_a_sentence(model):
    cache = model.cache(X4, modules="h.*")
    for miss in (lambda: cache["head"], lambda: cache.hedd, lambda: cache.h[7], lambda: cache.h[0].lin):
        with pytest.raises(CacheError, match=r"The cache has nothing of"):
            miss()
    with pytest.raises(AttributeError):
        cache._probe


def test_each_visit_of_a_generation_is_an_entry(model):
    with model.trace(X4, fn="generate") as tracer:
        cache = tracer.cache("h.0")
    (seen,) = outputs(model, lambda: model._module.generate(X4), "h.0")
    assert [each.step for each in cache["h.0"].visits] == [0, 1, 2]
    for entry, expected in zip(cache["h.0"].visits, seen, strict=True):
        assert torch.equal(entry.output, expected)
    with pytest.raises(CacheError) as caught:
        cache["h.0"].output
    assert str(caught.value).splitlines()[0] == "`model.h[0]` was visited 3 times."


def test_positions_are_chosen_before_anything_is_stored(gpt2):
    with gpt2.trace("The Eiffel Tower is in") as tracer:
        cache = tracer.cache("transformer.h.*", positions=-1)
        whole = gpt2.transformer.h[1].hidden
    assert torch.equal(cache["transformer.h.1"].hidden, whole[:, -1:])
    for positions in (slice(1, 3), [1, 2]):
        assert torch.equal(
            gpt2.cache("The Eiffel Tower is in", modules="transformer.h.1", positions=positions)["transformer.h.1"].hidden,
            whole[:, 1:3],
        )


def test_dtype_and_detachment_are_as_asked(model):
    cache = model.cache(X4, modules="h.0", dtype=torch.float16)
    assert cache["h.0"].output.dtype is torch.float16
    assert not cache["h.0"].output.requires_grad
    attached = model.cache(X4, modules="h.0", detach=False)["h.0"].output
    attached.sum().backward()
    assert model._module.h[0].lin.weight.grad is not None


def test_an_invokes_cache_keeps_its_rows_and_the_traces_all(model):
    other = X4 + 1
    with model.trace() as tracer:
        everything = tracer.cache("h.*")
        with tracer.invoke(X4):
            mine = tracer.cache("h.*")
        with tracer.invoke(other):
            pass
    assert torch.equal(everything["h.1"].output, model.cache(torch.cat((X4, other)), modules="h.1")["h.1"].output)
    assert torch.equal(mine["h.1"].output, everything["h.1"].output[:1])


def test_what_is_saved_is_loaded_again(gpt2, tmp_path):
    with gpt2.trace("The Eiffel Tower is in", use_cache=False) as tracer:
        cache = tracer.cache(include_inputs=True)
    cache.save(tmp_path / "cache.safetensors")
    loaded = Cache.load(tmp_path / "cache.safetensors")
    assert loaded.keys() == cache.keys()
    assert loaded.nbytes == cache.nbytes
    assert torch.equal(loaded["transformer.h.1"].hidden, cache["transformer.h.1"].hidden)
    assert torch.equal(loaded[""].output["logits"], cache[""].output.logits)
    assert repr(loaded) == repr(cache)


def test_what_cannot_be_saved_and_what_is_no_cache_is_a_sentence(gpt2, tmp_path):
    with pytest.raises(CacheError, match="which a file of tensors cannot keep"):
        gpt2.cache("The Eiffel Tower is in", modules="transformer", use_cache=True).save(tmp_path / "cache")
    (tmp_path / "text").write_text("this is no cache")
    for name in ("text", "nothing"):
        with pytest.raises(CacheError, match="is not a cache that was saved"):
            Cache.load(tmp_path / name)


def test_a_cache_neither_pauses_the_model_nor_stays_behind(model):
    before = [dict(each.__dict__) for each in model._module.modules()]
    with model.trace(X4) as tracer:
        tracer.cache()
    with model.trace(X4):
        pass
    after = [dict(each.__dict__) for each in model._module.modules()]
    assert [list(each) for each in after] == [list(each) for each in before]
    assert all(visit.watchers == () for visit in model._tree.memory.visits.values())


def test_a_position_that_is_not_there_is_a_sentence(gpt2):
    with pytest.raises(CacheError) as caught, gpt2.generate("The Eiffel", max_new_tokens=3) as tracer:
        tracer.cache("transformer.h.0", positions=1)
    assert str(caught.value).splitlines()[0] == "`positions=1` is not in [1, 1, 32] float32, whose positions are dimension 1."


def test_a_generations_cache_shows_how_often_each_was_visited_and_what_is_left_out(model):
    with model.trace(X4, fn="generate") as tracer:
        cache = tracer.cache("h.0")
    assert "visits" in repr(cache).splitlines()[1]
    assert repr(cache).splitlines()[-1].split()[-1] == "3"
    assert cache["h.0"]
    with pytest.raises(CacheError, match="The cache has nothing of"):
        cache.h.visits


def test_what_a_cache_does_not_have_is_named_as_it_was_asked_for(model):
    with model.trace(X4) as tracer:
        cache = tracer.cache()
    with pytest.raises(CacheError, match=r"^The cache has nothing of `model\.nowhere`\."):
        cache["model.nowhere"]


def test_a_cache_of_what_is_not_there_is_refused_at_the_users_line(model):
    with pytest.raises(PathError) as caught:
        model.cache(X4, modules="nothing")
    assert [each.path for each in caught.traceback] == [Path(__file__)]
