"""Uses of the public interface, checked by mypy and never run."""

from typing import Any

import torch

from nnsight_eager import (
    Activations,
    Cache,
    Envoy,
    HeldRun,
    LanguageModel,
    NNsight,
    OutOfOrderError,
    Trace,
    connect,
    has_nan,
    norm_above,
    plot,
    report,
    save,
    shape_is,
    shapes,
    summary,
)  # fmt: skip


def read_and_edit(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    model = NNsight(module)
    with model.trace(x, fn="encode") as tracer:
        layer: Envoy = model.layers[0]
        hidden: torch.Tensor = layer.output
        layer.output = hidden * 2
        layer.hidden = layer.hidden + 1
        layer.input = layer.input.clone()
        layer.inputs = ((hidden,), {})
        layer.skip(hidden)
        further: torch.Tensor = layer.next().output
        tracer.next()
    result: Any = tracer.result
    assert isinstance(result, torch.Tensor)
    return save(further)


def generate(prompt: str | list[str] | list[int]) -> list[int]:
    model = LanguageModel("openai-community/gpt2", device_map="auto", dtype=torch.bfloat16, dispatch=True)
    steps: list[int] = []
    with model.generate(prompt, max_new_tokens=3) as tracer:
        for step in tracer.iter[0:3:2]:
            steps.append(step)
        for step in tracer.all():
            steps.append(step)
        output: torch.Tensor = model.generator.output
        print(shapes(output))
        tracer.stop()
    return steps


def side_by_side(model: LanguageModel) -> None:
    with model.trace("a") as one, model.trace("b") as two:
        two.model.transformer.h[0].output = one.model.transformer.h[0].output


def facts(error: OutOfOrderError) -> tuple[str, str, int]:
    return error.asked, error.paused_at, error.step


def held(trace: Trace) -> Envoy:
    return trace.model


def several_prompts(model: LanguageModel) -> None:
    with model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke("The Eiffel Tower is in"):
            hidden = model.transformer.h[5].hidden
            barrier()
        patched = tracer.invoke("The Colosseum is in", lambda: model.lm_head.output)
        with tracer.invoke():
            model.transformer.h[5].hidden = hidden
    patched.result
    with model.trace(batched=False) as tracer, tracer.invoke("The Eiffel Tower is in"):
        pass


def kept(model: LanguageModel) -> Cache:
    with model.generate("The Eiffel Tower", max_new_tokens=3) as tracer:
        cache = tracer.cache(["transformer.h.*", model.lm_head], positions=-1)
    cache["transformer.h.0"].visits[1].output
    cache.transformer.h[0].hidden
    cache.save("cache.safetensors")
    return Cache.load("cache.safetensors")


def edited(model: LanguageModel, vector: torch.Tensor) -> None:
    with model.edit() as view:
        model.transformer.h[5].mlp.output *= 0
    view.trace("The Eiffel Tower").result
    handle = model.steer(model.transformer.h[5], vector, scale=4, positions=[0, 1])
    handle.remove()
    with model.ablate(model.transformer.h[5].mlp, "mean"), model.session():
        model.clear_edits()


def shapes_alone(model: LanguageModel) -> None:
    with model.scan("The Eiffel Tower"):
        model.transformer.h[5].attn.pattern.shape
    model.map("The Eiffel Tower").rows[0].output


def extracted(model: LanguageModel) -> list[torch.Tensor]:
    points = ["transformer.h.*", model.lm_head]
    activations: Activations = model.extract(["The Eiffel Tower"], points, "folder", batch_tokens=64, dtype=torch.float16)
    text = activations[0]
    width: int = Activations("folder").points["lm_head"].shape[0]
    return [text.tokens, text["lm_head"][:, :width], *(shard["transformer.h.5"] for shard in activations.shards())]


def inside_a_forward(model: LanguageModel) -> None:
    with model.trace("The Eiffel Tower"):
        attention = model.transformer.h[5].attn.source.attention_interface_1
        attention.inputs
        attention.skip(attention.input)
        for visit in attention.source["expert_0"].visits():
            visit.output *= 0


def backwards(model: LanguageModel) -> torch.Tensor:
    with model.trace("The Eiffel Tower") as tracer:
        hidden: torch.Tensor = model.transformer.h[5].hidden
        with tracer.backward(model.lm_head.output.sum(), retain_graph=True):
            model.transformer.h[5].output_grad *= 2
    return hidden


def named_anew(module: torch.nn.Module) -> LanguageModel:
    model = LanguageModel("openai-community/gpt2", rename={"transformer.h": "layers", torch.nn.Linear: "linear"})
    model.load_adapter("folder")
    model.layers[0].adapter = module
    model.layers[0].adapter(torch.zeros(1), hook=True)
    return model


def held_by_hand(model: LanguageModel) -> list[str]:
    run: HeldRun = model.trace("The Eiffel Tower").start()
    run.step(3).over().out().to(model.transformer.h[5]).to("transformer.h.6", "input")
    run.until(has_nan).until(norm_above(3)).until(shape_is(1, None, 768))
    other = run.fork()
    other.model.transformer.h[6].output *= 0
    with run.backward(other.finish().logits.sum()):
        pass
    run.back_to("transformer.h.5").restart()
    print(run.where(), run.locals()["hidden_states"], run.edits[0].warning, run.finish())
    with model.trace("The Eiffel Tower", keep=True) as tracer:
        tracer.model.transformer.h[5].output
    return run.paths()


def remotely(prompts: list[str]) -> float:
    model = connect("llama", address="10.0.0.1:6379")
    with model.trace(prompts, retries=1) as tracer:
        hidden: torch.Tensor = model.model.layers[5].output
        handle = model.model.layers[6].output_ref
        model.model.layers[7].output = hidden * 0
        cache: Cache = tracer.cache("model.layers.*", positions=-1)
    print(handle.shape, handle[:, -1].get(), cache.keys(), tracer.result)
    run = model.trace(prompts[0]).start().step(2).to(model.model.layers[5])
    run.fork().finish()

    def norm(served: LanguageModel, scale: float) -> float:
        report(1, 2, "prompts")
        return float(served.trace(prompts[0]).result.logits.norm()) * scale

    blocks = [model.trace(prompt).submit(norm, scale=2.0) for prompt in prompts]
    print([float(each.result()) for each in blocks])
    future = model.submit(norm, scale=2.0, retries=1)
    print(future.progress.done, future.done(), model.status())
    return future.result(timeout=10)  # type: ignore[no-any-return]


def look_and_draw(model: LanguageModel, logits: torch.Tensor, pattern: torch.Tensor) -> None:
    line: str = str(summary(logits))
    tokens: list[str] = plot.tokens(model, line)
    figure: plot.Plot = plot.logit_lens(logits, tokens, model.tokenizer.decode)
    figure.save("lens.png")
    plot.attention(pattern, tokens, heads=[0, 1]).save("attention.png")
    plot.patching(logits[:, :, 0], tokens).figure.suptitle("A title")
