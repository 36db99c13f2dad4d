"""What the ranks of a test do: each runs this file, and says of every check whether it held.

    python tests/on_ranks.py FOLDER CHECK ...       # with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT

A check runs the same program on the divided model and on one that this process has alone, and compares.
"""

import errno
import itertools
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

import nnsight_eager
from nnsight_eager import LanguageModel, NNsight
from nnsight_eager.nested import tensors

CHECKS: dict[str, Callable] = {}
KINDS = ["llama", "gemma3_text", "mixtral", "qwen3_moe"]
IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 3, 9, 1, 4, 2]])
FOLDER = Path()


def check(function):
    CHECKS[function.__name__] = function
    return function


def of_each_kind(function):
    """A check of the divided model and the whole one, of each architecture."""
    for kind in KINDS:
        CHECKS[f"{function.__name__}[{kind}]"] = lambda kind=kind: function(*pair(kind))
    return function


def of_some_kinds(function):
    """One that takes its time."""
    for kind in KINDS[:3]:
        CHECKS[f"{function.__name__}[{kind}]"] = lambda kind=kind: function(*pair(kind))
    return function


def checks_for(size):
    """What so many ranks run: four of them what depends on their number."""
    if size == 2:
        return [name for name in CHECKS if name != "ranks_that_divide_and_ranks_that_have_inputs_of_their_own"]
    short = ("[gemma3_text]", "[qwen3_moe]")
    long = ("every_point_is_replaced", "every_point_is_changed", "operations_are", "inside_what", "ranks_that_are_given")
    return [name for name in CHECKS if not name.endswith(short) and not name.startswith(long)]


@cache
def pair(kind):
    """The model divided among the ranks, and the whole of it in this process."""
    return (
        LanguageModel(FOLDER / kind, tp_plan="auto", dispatch=True),
        LanguageModel(FOLDER / kind, dispatch=True),
    )


def same(one, other, what="", tolerance=1e-5):
    """Whether the tensors in two values are the same, within 1e-5 of their size."""
    here, there = [*tensors(one)], [*tensors(other)]
    assert [each.shape for each in here] == [each.shape for each in there], (
        what,
        [e.shape for e in here],
        [e.shape for e in there],
    )
    for a, b in zip(here, there, strict=True):
        if not b.is_floating_point():
            assert torch.equal(a, b), what
        else:
            scale = max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0
            torch.testing.assert_close(a, b, atol=tolerance * scale, rtol=tolerance, msg=lambda text: f"{what}: {text}")


def kept(value):
    return [each.detach().clone() for each in tensors(value)]


@cache
def points(kind_of_model):
    """Every input and output, in the order in which the model comes by them."""
    _, solo = pair(kind_of_model)
    found = {}
    with solo.trace(IDS) as tracer:
        for path, module in solo._module.named_modules():
            tracer.watch(module, lambda visit, path=path: found.setdefault((path, visit.kind)))
    return [*found]


def at(model, path):
    return model[path] if path else model


def both(models, program):
    """What a program gives on the divided model and on the whole one."""
    return [program(model) for model in models]


@of_each_kind
def every_point_is_read_whole(*models):
    every = points(kind_of(models))

    def program(model):
        with model.trace(IDS):
            return [kept(at(model, path).inputs if kind == "input" else at(model, path).output) for path, kind in every]

    for point, one, other in zip(every, *both(models, program), strict=True):
        same(one, other, point)
    with torch.no_grad():
        for point, one, other in zip(every, *both(models, program), strict=True):
            same(one, other, point)


def kind_of(models):
    return models[0]._module.config.model_type


@of_some_kinds
def every_point_is_replaced_whole(*models):
    for path, kind in points(kind_of(models)):
        if not path or "rotary" in path:
            continue

        def program(model, path=path, kind=kind):
            with model.trace(IDS, use_cache=False) as tracer:
                envoy = at(model, path)
                if kind == "output":
                    if envoy.hidden.is_floating_point():
                        envoy.hidden = envoy.hidden * torch.linspace(0.5, 1.5, envoy.hidden.shape[-1])
                else:
                    args, kwargs = envoy.inputs
                    first = next(iter((*args, *kwargs.values())))
                    if first.is_floating_point():
                        envoy.input = first * torch.linspace(0.5, 1.5, first.shape[-1])
            return tracer.result.logits

        same(*both(models, program), (path, kind))


@of_some_kinds
def every_point_is_changed_in_place(*models):
    def program(model, path, kind):
        with torch.no_grad(), model.trace(IDS, use_cache=False) as tracer:
            envoy = at(model, path)
            value = next(tensors(envoy.inputs if kind == "input" else envoy.output))
            if value.is_floating_point():
                value[..., 1::3] *= 2
                value[:, -1] += 0.1
        return tracer.result.logits

    for path, kind in points(kind_of(models)):
        if path and "rotary" not in path:
            same(*(program(model, path, kind) for model in models), (path, kind))


@of_some_kinds
def operations_are_read_and_replaced(*models):
    """Every operation of attention and of the feed-forward, but for those of the library's own division."""

    def program(model, module, name, edit):
        operation = getattr(at(model, module).source, name)
        with torch.no_grad(), model.trace(IDS, use_cache=False) as tracer:
            at(model, module).source  # from here on its operations are heard
            given, value = kept(operation.inputs), operation.output
            if edit and isinstance(value, torch.Tensor) and value.is_floating_point():
                operation.output = value * 1.5
            read = kept(value)
        return [given, read, tracer.result.logits]

    divided, solo = models
    for module in ("model.layers.0.self_attn", "model.layers.0.mlp"):
        names = [*at(solo, module).source]
        assert names == [*at(divided, module).source]
        names = [each for each in names if "kwargs" not in each]
        for name in names:
            try:
                expected = program(solo, module, name, True)
            except nnsight_eager.NotReachedError:
                continue
            same(program(divided, module, name, True), expected, (module, name))


@of_each_kind
def patterns_are_read_and_replaced(*models):
    def program(model):
        with torch.no_grad(), model.trace(IDS) as tracer:
            attention = model.model.layers[1].self_attn
            before = attention.pattern.clone()
            attention.pattern[:, 1] = 0
            attention.pattern = attention.pattern * torch.linspace(0.5, 1.5, before.shape[1])[:, None, None]
        return [before, tracer.result.logits]

    same(*both(models, program))


@of_each_kind
def a_generation_is_read_and_edited(*models):
    def program(model):
        read = []
        with model.generate(IDS, max_new_tokens=5, do_sample=False) as tracer:
            for step in tracer.iter[:]:
                layer = model.model.layers[0]
                read += kept(layer.self_attn.inputs)  # the cache of keys and values too
                read += kept(layer.self_attn.k_proj.output)
                if step == 2:
                    layer.self_attn.v_proj.output *= -1
                read += kept(layer.self_attn.o_proj.input)
                read += kept(model.lm_head.output)
                read += kept(model.output)
        return [read, tracer.result]

    same(*both(models, program), tolerance=1e-4)


@of_each_kind
def invokes_see_their_rows_of_the_whole(*models):
    def program(model):
        with torch.no_grad(), model.trace() as tracer:

            @tracer.invoke([1, 2, 3, 4])
            def one():
                before = model.model.layers[0].self_attn.q_proj.output.clone()
                return before, model.lm_head.output.clone()

            @tracer.invoke([5, 6, 7, 8, 9, 10])
            def other():
                model.model.layers[0].self_attn.q_proj.output[..., :3] = one_before()
                model.model.layers[1].self_attn.o_proj.input *= 0.5
                return model.lm_head.output.clone()

            def one_before():
                return 0.25

            everything = tracer.invoke(lambda: model.model.layers[1].self_attn.o_proj.input.clone())
        return [one.result, other.result, everything.result, tracer.result.logits]

    same(*both(models, program))


@of_each_kind
def caches_keep_the_whole(*models):
    def program(model):
        with torch.no_grad(), model.trace(IDS, use_cache=False) as tracer:
            cache = tracer.cache(include_inputs=True)
        return {path: [(each.output, each.inputs) for each in cache[path].visits] for path in cache}

    one, other = both(models, program)
    assert one.keys() == other.keys()
    for path in other:
        same(one[path], other[path], path)


@of_each_kind
def gradients_are_whole(*models):
    def program(model):
        with model.trace(IDS) as tracer:
            layers = model.model.layers
            reads = [layers[0].self_attn.v_proj.output, layers[0].self_attn.o_proj.input, layers[0].hidden]
            reads += [layers[1].self_attn.q_proj.output, layers[1].self_attn.output[0], model.lm_head.output]
            loss = reads[-1].float().logsumexp(-1).mean() + reads[1].square().mean()
            grads = []
            with tracer.backward(loss):
                for each in reversed(reads):
                    grads.append(each.grad.clone())
        return [kept(reads), grads]

    same(*both(models, program))


@of_each_kind
def gradients_are_replaced(*models):
    def program(model):
        with model.trace(IDS) as tracer:
            layers = model.model.layers
            early, late = layers[0].self_attn.o_proj.input, layers[1].self_attn.v_proj.output
            loss = model.lm_head.output.float().logsumexp(-1).mean()
            with tracer.backward(loss):
                layers[1].self_attn.v_proj.output_grad *= torch.linspace(0.5, 1.5, late.shape[-1])
                return early.grad.clone()

    same(*both(models, program))


@of_each_kind
def a_gradient_by_what_was_read(*models):
    def program(model):
        with model.trace(IDS):
            read = model.model.layers[0].self_attn.v_proj.output
            changed = model.model.layers[1].self_attn.o_proj.input
            changed = model.model.layers[1].self_attn.o_proj.input = changed * 2
            loss = model.lm_head.output.float().logsumexp(-1).mean()
            return torch.autograd.grad(loss, [read, changed])

    same(*both(models, program))


@of_each_kind
def an_edit_in_place_has_a_gradient(*models):
    def program(model):
        with model.trace(IDS) as tracer:
            layers = model.model.layers
            early = layers[0].self_attn.v_proj.output
            layers[0].self_attn.o_proj.output[..., 3:20] *= 0.5  # whole, and of torch's own making
            layers[1].self_attn.q_proj.output[:, -1, ::3] = 0
            loss = model.lm_head.output.float().logsumexp(-1).mean()
            gradient = torch.autograd.grad(loss, early)
        return [gradient, tracer.result.logits]

    same(*both(models, program))


REFUSED = object()


def given_or_refused(program):
    try:
        return program()
    except RuntimeError as error:
        if "place" not in str(error):
            raise
        return REFUSED


@of_each_kind
def random_programs(*models):
    """Reads and edits at random points, in place and by assignment, all on one pass."""
    every = [each for each in points(kind_of(models)) if each[0] and "rotary" not in each[0]]
    for seed in range(12):
        draw = random.Random(seed)
        chosen = sorted(draw.sample(range(len(every)), 6))
        acts = [draw.choice(["read", "double", "in place", "cut", "local"]) for _ in chosen]

        def program(model, chosen=chosen, acts=acts, grad=seed % 2 == 0):
            read = []
            with torch.set_grad_enabled(grad), model.trace(IDS, use_cache=False) as tracer:
                for number, act in zip(chosen, acts, strict=True):
                    path, kind = every[number]
                    envoy = at(model, path)
                    value = next(tensors(envoy.inputs if kind == "input" else envoy.output))
                    read.append(kept(value))
                    if not value.is_floating_point() or act == "read":
                        continue
                    if act == "local" and kind == "output":
                        envoy.local.hidden = envoy.local.hidden * 0.5
                        read.append(kept(envoy.hidden))
                    elif act == "in place":
                        value[..., ::2] = 0.1
                    elif kind == "output":
                        envoy.hidden = value * 2 if act == "double" else value.clamp(-1, 1)
                    elif envoy.inputs[0]:
                        envoy.input = value * 2 if act == "double" else value.clamp(-1, 1)
            return [read, tracer.result.logits]

        what = seed, [every[n] for n in chosen], acts
        expected = given_or_refused(lambda program=program: program(models[1]))
        if expected is REFUSED:  # by torch: what a gradient needs, or a part of a split, is not changed in place
            assert given_or_refused(lambda program=program: program(models[0])) is REFUSED
            continue
        same(program(models[0]), expected, what, tolerance=2e-5)


@of_each_kind
def a_module_is_left_out(*models):
    def program(model):
        with torch.no_grad(), model.trace(IDS) as tracer:
            q = model.model.layers[0].self_attn.q_proj
            q.skip(torch.linspace(-1, 1, 2 * 6 * 32).reshape(2, 6, 32))
            seen = q.output.clone()
            layer = model.model.layers[1]
            layer.skip(layer.input)
        return [seen, tracer.result.logits]

    same(*both(models, program))


@of_each_kind
def edits_stay(*models):
    def program(model):
        gain = torch.linspace(0.5, 1.5, 32)

        def edit():
            model.model.layers[0].self_attn.q_proj.output = model.model.layers[0].self_attn.q_proj.output * gain

        handle = model.edit(edit, inplace=True)
        try:
            with model.steer(model.model.layers[0], gain, scale=2), torch.no_grad(), model.trace(IDS) as tracer:
                read = model.model.layers[1].self_attn.o_proj.input.clone()
        finally:
            handle.remove()
        return [read, tracer.result.logits]

    same(*both(models, program))


@check
def the_mask_of_a_prompt_is_read_where_it_is_met():
    models = pair("llama")

    def program(model):
        with model.trace(IDS.tolist()):
            return [kept(model.inputs), kept(model.model.inputs), kept(model.model.layers[1].input)]

    for one, other in zip(*both(models, program), strict=True):
        same(one, other)


@check
def a_run_is_held_by_hand():
    def program(model):
        with torch.no_grad():
            run = model.trace(IDS).start()
            run.to(model.model.layers[0].self_attn.q_proj, "output")
            model.model.layers[0].self_attn.q_proj.output *= 2
            other = run.fork()
            seen = [str(run.step(3)).split(":")[0]]
            read = model.model.layers[0].self_attn.o_proj.input.clone()
            other.model.model.layers[1].self_attn.o_proj.input *= 0
            return read, run.finish().logits, other.finish().logits, seen

    one, other = both(pair("llama"), program)
    same(one, other)
    assert one[-1] == other[-1]


@check
def local_is_what_this_rank_holds():
    divided, solo = pair("gemma3_text")
    ranks, here = torch.distributed.get_world_size(), torch.distributed.get_rank()
    with torch.no_grad():
        with solo.trace(IDS):
            whole = solo.model.layers[0].mlp.act_fn.output.clone()
            assert solo.model.layers[0].mlp.up_proj.local.output is solo.model.layers[0].mlp.up_proj.output
        with divided.trace(IDS) as tracer:
            point = divided.model.layers[0].mlp.act_fn
            part = point.local.output
            assert part.shape[-1] == whole.shape[-1] // ranks
            same(part, whole.chunk(ranks, -1)[here])
            point.local.output = torch.zeros_like(part) + here
            expected = torch.arange(ranks).repeat_interleave(whole.shape[-1] // ranks).expand_as(whole).float()
            same(point.output, expected)
        with solo.trace(IDS) as alone:
            solo.model.layers[0].mlp.act_fn.output = expected
    same(tracer.result.logits, alone.result.logits)


@check
def one_rank_is_the_first():
    divided, _ = pair("llama")
    with divided.trace(IDS) as tracer:
        assert tracer.rank0 == (torch.distributed.get_rank() == 0)


@check
def what_would_show_this_ranks_part_is_refused():
    divided, _ = pair("llama")
    assert "divided among ranks" in str(refused(lambda: divided.scan(IDS), nnsight_eager.InputError))


@check
def all_ranks_extract_and_rank_0_writes():
    divided, solo = pair("llama")
    ranks, here = torch.distributed.get_world_size(), torch.distributed.get_rank()
    texts = [[*range(number % 4 + 1), number] for number in range(12)]
    points = ["model.layers.*", "model.layers.0.mlp.act_fn"]
    options = {"batch_tokens": 8, "shard_bytes": 12_000}

    def extracted():
        return divided.extract(texts, points, FOLDER / f"divided-{ranks}", **options)

    def compare(here, there):
        assert here.points == there.points
        for one, other in zip(here, there, strict=True):
            assert one.tokens.equal(other.tokens)
            same([one[path] for path in here.points], [other[path] for path in here.points])

    alone = solo.extract(texts, points, FOLDER / f"alone-{ranks}-{here}", **options)
    compare(extracted(), alone)
    shards = sorted((FOLDER / f"divided-{ranks}").glob("shard-*.safetensors"))
    assert len(shards) > 1
    torch.distributed.barrier()
    if here == 0:  # as an extraction leaves it that was killed
        shards[1].unlink()
    compare(extracted(), alone)
    error = refused(lambda: divided.extract(texts[:3], points, FOLDER / f"divided-{ranks}"), nnsight_eager.ExtractError)
    assert ("Rank 0 cannot" if here else "another request") in str(error)


@check
def a_disk_that_is_full_on_rank_0_ends_an_extraction_on_every_rank_and_it_goes_on_when_there_is_room():
    from nnsight_eager.shard import Shard

    divided, _ = pair("llama")
    ranks, here = torch.distributed.get_world_size(), torch.distributed.get_rank()
    add, added = Shard.add, itertools.count()

    def full(shard, name, value):
        if next(added) == 7:  # in the middle of a shard
            raise OSError(errno.ENOSPC, "No space left on device")
        add(shard, name, value)

    def extracted():
        texts = [[number, 1, 2] for number in range(8)]
        return divided.extract(texts, ["model.layers.*"], FOLDER / f"full-{ranks}", batch_tokens=6, shard_bytes=4_000)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Shard, "add", full)
        error = refused(extracted, nnsight_eager.ExtractError if here else OSError)
    assert ("Rank 0 cannot extract to its folder" if here else "No space left on device") in str(error)
    assert len(extracted()) == 8


def refused(function, kind=nnsight_eager.RanksError):
    """What a function is refused with."""
    with pytest.raises(kind) as raised:
        function()
    return raised.value


@check
def ranks_that_ask_for_different_points_are_told_so():
    divided, solo = pair("llama")
    here = torch.distributed.get_rank()

    def program():
        with divided.trace(IDS):
            divided.model.layers[0].self_attn.output
            divided.model.layers[1 if here == 0 else 0].mlp.output

    error = refused(program)
    assert "rank 0 asks for `model.model.layers[1].mlp.output` in step 0" in str(error), error
    assert "rank 1 asks for `model.model.layers[0].mlp.output` in step 0" in str(error), error
    assert error.asked[1] == "`model.model.layers[0].mlp.output` in step 0"
    same(*both((divided, solo), lambda model: model.trace(IDS).result.logits))  # and they go on together


@check
def a_point_that_one_rank_asks_for_is_told():
    divided, _ = pair("llama")

    def program():
        with divided.trace(IDS) as tracer:
            if tracer.rank0:
                print(divided.model.layers[0].output.norm())

    error = refused(program)
    assert "rank 0 asks for `model.model.layers[0].output` in step 0" in str(error), error
    assert "rank 1 asks for the end of the forward pass in step 0" in str(error), error


@check
def a_value_that_one_rank_puts_together_is_told():
    divided, _ = pair("llama")

    def program():
        with divided.trace(IDS) as tracer:
            value = divided.model.layers[0].mlp.down_proj
            value.output  # on every rank, whole as it is
            if tracer.rank0:
                value.input

    error = refused(program)
    assert "rank 0 asks for all of `model.model.layers[0].mlp.down_proj.input`" in str(error), error


@check
def ranks_that_are_given_different_inputs_are_told():
    divided, _ = pair("llama")
    ids = IDS[:, : 3 + (torch.distributed.get_rank() == 0)]
    assert "of a call with ([2, 4] int64" in str(refused(lambda: divided.trace(ids).result))


@check
def edits_with_different_values_are_told():
    divided, _ = pair("llama")
    here = torch.distributed.get_rank()

    def assigned():
        with divided.trace(IDS):
            hidden = divided.model.layers[0].output
            divided.model.layers[0].output = hidden + torch.rand(hidden.shape, generator=torch.Generator().manual_seed(here))
            divided.lm_head.output

    def in_place():
        with torch.no_grad(), divided.trace(IDS):
            divided.model.layers[0].self_attn.q_proj.output[..., 0] += here

    for edit in (assigned, in_place):
        assert "have made edits with different values" in str(refused(edit))


@check
def what_cannot_be_told_is_refused_and_local_is_there():
    divided, _ = pair("llama")
    down = divided.model.layers[0].mlp.down_proj
    with torch.no_grad(), divided.trace(IDS):
        partial = down.source.F_linear_0
        error = refused(lambda: partial.output, nnsight_eager.ShardError)
        assert "`.local`" in str(error), error
        mine = partial.local.output.clone()
        whole = down.output.clone()
    torch.distributed.all_reduce(mine)
    same(mine, whole)


@check
def a_value_of_another_shape_is_refused():
    divided, _ = pair("llama")
    with torch.no_grad(), divided.trace(IDS):
        up = divided.model.layers[0].mlp.up_proj
        error = refused(lambda: setattr(up, "output", torch.zeros(2, 6, 3)), nnsight_eager.EditError)
        assert "of which each rank has a part" in str(error), error


@check
def experts_on_ranks_of_their_own():
    from transformers.distributed import DistributedConfig

    size = torch.distributed.get_world_size()
    config = DistributedConfig(tp_size=size, ep_size=size)
    models = LanguageModel(FOLDER / "mixtral", distributed_config=config, dispatch=True), pair("mixtral")[1]
    every = [each for each in points("mixtral") if "experts.act_fn" not in each[0]]

    def program(model):
        with torch.no_grad(), model.trace(IDS):
            return [kept(at(model, path).inputs if kind == "input" else at(model, path).output) for path, kind in every]

    for point, one, other in zip(every, *both(models, program), strict=True):
        same(one, other, point)
    with torch.no_grad(), models[0].trace(IDS):
        inside = models[0].model.layers[0].mlp.experts.act_fn
        error = refused(lambda: inside.output, nnsight_eager.ShardError)
        assert "as experts are among ranks" in str(error), error
        assert inside.local.output.dim() == 2


class Perceptron(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.act, self.down = torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


@check
def ranks_that_divide_and_ranks_that_have_inputs_of_their_own():
    """Two by two: each pair runs the model on an input of its own, and may ask for points of its own."""
    from transformers.distributed import DistributedConfig

    models = (
        LanguageModel(FOLDER / "mixtral", distributed_config=DistributedConfig(tp_size=2, fsdp_size=2), dispatch=True),
        pair("mixtral")[1],
    )
    row = torch.distributed.get_rank() // 2
    every = points("mixtral")[row::2]

    def program(model):
        with torch.no_grad(), model.trace(IDS[row : row + 1]):
            return [kept(at(model, path).inputs if kind == "input" else at(model, path).output) for path, kind in every]

    for point, one, other in zip(every, *both(models, program), strict=True):
        same(one, other, point)


def operation_in(model, path, names):
    """An operation by its names; what is inside another's function is known when the run is paused at its input."""
    point = at(model, path)
    for name in names[:-1]:
        point = getattr(point.source, name)
        point.input
    return getattr(point.source, names[-1])


@check
def inside_what_is_divided_nothing_wrong_is_read():
    """The operations in divided modules, of packed weights too: what one process has there, or a refusal."""
    read = refusals = 0
    for kind, module, above in (
        ("mixtral", "mlp.experts", ("experts_forward_1",)),
        ("llama", "self_attn.q_proj", ()),
        ("llama", "self_attn.o_proj", ()),
    ):
        divided, solo = pair(kind)
        path = f"model.layers.0.{module}"
        with torch.no_grad(), solo.trace(IDS):
            if above:
                operation_in(solo, path, above).input
            names = [*(operation_in(solo, path, above).source if above else at(solo, path).source)]
        for name in names:
            if "empty" in name or name == "inv_perm_0":  # memory as it happened to be
                continue

            def program(model, path=path, above=above, name=name):
                with torch.no_grad(), model.trace(IDS, use_cache=False):
                    return kept(operation_in(model, path, (*above, name)).output)

            try:
                expected = program(solo)
                same(program(divided), expected, (path, name))
                read += bool(expected)
            except nnsight_eager.ShardError:
                refusals += 1
            except nnsight_eager.NotReachedError:
                continue
    assert read > 15
    assert refusals > 5


@check
def a_model_without_a_plan_is_refused():
    error = refused(lambda: LanguageModel(FOLDER / "gpt2", tp_plan="auto", dispatch=True), nnsight_eager.LoadError)
    assert "has no `tp_plan`" in str(error), error


@check
def a_plan_of_torchs_own_and_dtensors():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("tp",))
    x = torch.linspace(-1, 1, 24).reshape(3, 8)
    for plain in (True, False):
        plan = {"up": ColwiseParallel(use_local_output=plain), "down": RowwiseParallel()}
        divided = NNsight(parallelize_module(Perceptron(), mesh, plan))

        def program(model):
            with model.trace(x) as tracer:
                read = [model.up.output, model.act.output]
                model.act.output = read[1] * torch.linspace(0, 1, 16)
                read += [model.down.input, model.down.output]
            return [read, tracer.result]

        one, other = program(divided), program(NNsight(Perceptron()))
        assert not any(isinstance(each, DTensor) for each in tensors(one))
        same(one, other, plain)
        with divided.trace(x):
            assert isinstance(divided.act.local.output, DTensor) is not plain


class Reused(Perceptron):
    """Calls one module on what is divided, and on what is whole."""

    def forward(self, x):
        return self.act(self.down(self.act(self.up(x))))


@check
def a_module_that_is_divided_in_one_visit_and_not_in_another_is_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("tp",))
    divided = NNsight(parallelize_module(Reused(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()}))
    x = torch.linspace(-1, 1, 24).reshape(3, 8)
    with divided.trace(x):
        error = refused(lambda: divided.act.output, nnsight_eager.ShardError)
        assert "in different ways at its visits" in str(error), error
        assert divided.act.local.output.shape == (3, 16 // mesh.size())


@check
def fully_sharded_weights_are_read_and_edited_as_usual():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    module = Perceptron()
    for each in (module.up, module.down, module):
        fully_shard(each, mesh=mesh)
    x = torch.linspace(-1, 1, 24).reshape(3, 8) + torch.distributed.get_rank()  # each rank has inputs of its own

    def program(model):
        with model.trace(x) as tracer:
            read = [model.up.output.clone()]
            if torch.distributed.get_rank() == 0:  # and may look where it likes
                read += [model.act.output.clone()]
            model.down.input = model.down.input * 2
        return [read, tracer.result]

    same(program(NNsight(module)), program(NNsight(Perceptron())))


@check
def nothing_stays_on_the_modules():
    divided, _ = pair("llama")
    before = [(module, {**vars(module)}) for module in divided._module.modules()]
    with torch.no_grad(), divided.trace(IDS):
        divided.model.layers[0].self_attn.o_proj.input *= 2
        divided.model.layers[1].mlp.act_fn.output
    for module, own in before:
        assert vars(module).keys() == own.keys()
        assert all(vars(module)[name] is value for name, value in own.items() if name != "_parameters")


def main(folder, *names):
    global FOLDER
    FOLDER = Path(folder)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    results = {}
    for name in names or checks_for(torch.distributed.get_world_size()):
        start = time.perf_counter()
        try:
            CHECKS[name]()
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()[-3000:]
            if "another rank has not said" in results[name]:  # then nothing that follows would be heard
                break
        if os.environ.get("RANK") == "0":
            print(f"{time.perf_counter() - start:6.2f} s  {name}", flush=True)
    Path(folder, f"results-{os.environ['WORLD_SIZE']}-{os.environ['RANK']}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
