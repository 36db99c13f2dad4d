"""Images and text go through the processor, alone, in chats and in invokes, and give what plain hooks see."""

from types import SimpleNamespace

import pytest
import small_vision
import torch
from small_models import hooked
from small_vision import picture

from nnsight_eager import BatchError, InputError, LoadError, RowsError, VisionLanguageModel

pytestmark = pytest.mark.usefixtures("one_torch_thread")

PROMPT = "The Eiffel Tower <image> is in"
LAYER, TOWER = "model.language_model.layers.1", "model.vision_tower.encoder.layers.0"


@pytest.fixture(scope="module")
def model(folder):
    return VisionLanguageModel(folder("llava"), dispatch=True)


@pytest.fixture(scope="module")
def tower(model):
    """Where the vision tower has its layers, which transformers 4 wraps once more."""
    return next(name for name, _ in model._module.named_modules() if name.endswith("vision_tower.encoder.layers.0")
                or name.endswith("vision_tower.vision_model.encoder.layers.0"))  # fmt: skip


def processed(model, text, images):
    return model.processor(text=text, images=images, return_tensors="pt")


def chat(image, text="Paris", role="user"):
    return [{"role": role, "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


def same(one, other):
    return torch.allclose(one, other, atol=1e-5)


def test_a_folder_gives_the_tree_and_the_processor_at_once(folder):
    model = VisionLanguageModel(folder("llava"))
    assert model.model.language_model.layers[1].mlp.up_proj.weight.is_meta
    assert model.tokenizer is model.processor.tokenizer
    assert model.trace(PROMPT, images=picture(0)).result.logits.shape[-1] == len(model.tokenizer)


def test_a_prompt_with_an_image_reads_and_edits_as_plain_hooks_do(model, tower):
    inputs = processed(model, PROMPT, picture(0))
    (layer,), (seen,) = hooked(model._module, lambda: model._module(**inputs), LAYER, tower)
    with model.trace(PROMPT, images=picture(0)) as tracer:
        patches = model[tower].hidden
        hidden = model[LAYER].hidden
        model[LAYER].hidden = hidden * 0
    assert torch.equal(hidden, layer if isinstance(layer, torch.Tensor) else layer[0])
    assert torch.equal(patches, seen if isinstance(seen, torch.Tensor) else seen[0])
    assert (model.tokenizer.convert_tokens_to_ids("<image>") == inputs["input_ids"]).sum() == 16
    assert not same(tracer.result.logits, model._module(**inputs).logits)


def test_text_without_an_image_needs_none(model):
    expected = model._module(**model.tokenizer("Paris", return_tensors="pt")).logits
    assert same(model.trace("Paris").result.logits, expected)


def test_messages_bring_their_images_or_have_them_beside_them(model):
    image = picture(1)
    text = "user: <image>Paris; assistant: "
    expected = model._module(**processed(model, text, image)).logits
    beside = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Paris"}]}]
    for messages, keywords in ((chat(image), {}), (chat(image)[0], {}), (beside, {"images": image})):
        assert same(model.trace(messages, **keywords).result.logits, expected)
    both = model.trace([chat(image), chat(picture(2))]).result.logits
    assert same(both[:1], expected)


def test_a_generation_begins_with_the_image(model):
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    expected = model._module.generate(**processed(model, PROMPT, picture(0)), **options)
    steps = []
    with model.generate(PROMPT, images=picture(0), **options) as tracer:
        for _ in tracer.iter[:]:
            steps.append(model.lm_head.output[0, -1].argmax())
    assert torch.equal(tracer.result, expected)
    assert torch.equal(torch.stack(steps), expected[0, -3:])


def test_texts_of_different_length_are_padded_and_give_what_each_gives_alone(model):
    prompts, images = [PROMPT, "<image> Paris"], [picture(0), picture(1)]
    logits = model.trace(prompts, images=images).result.logits
    for row, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        alone = model._module(**processed(model, prompt, image)).logits
        assert same(logits[row, -alone.shape[1] :], alone[0])


def test_an_invoke_sees_its_own_rows_of_text_and_its_own_images(model, tower):
    alone, patches = [], []
    for prompt, image in ((PROMPT, picture(0)), ("<image> Paris", picture(1))):
        with model.trace(prompt, images=image):
            patches.append(model[tower].hidden)
            alone.append(model.lm_head.output[:, -1])
    with model.trace() as tracer:
        with tracer.invoke(PROMPT, images=picture(0)):
            one_patches = model[tower].hidden
            one = model.lm_head.output[:, -1]
        with tracer.invoke("<image> Paris", images=[picture(1)]):
            other_patches = model[tower].hidden
            other = model.lm_head.output[:, -1]
    assert same(one_patches, patches[0])
    assert same(other_patches, patches[1])
    assert same(one, alone[0])
    assert same(other, alone[1])


def test_an_image_patched_in_one_invoke_changes_no_other(model, tower):
    with model.trace() as tracer:
        with tracer.invoke(PROMPT, images=picture(0)):
            model[tower].hidden = torch.zeros_like(model[tower].hidden)
            changed = model.lm_head.output[:, -1]
        with tracer.invoke(PROMPT, images=picture(1)):
            other = model.lm_head.output[:, -1]
    assert same(other, model.trace(PROMPT, images=picture(1)).result.logits[:, -1])
    assert not same(changed, model.trace(PROMPT, images=picture(0)).result.logits[:, -1])


def test_two_images_in_each_prompt_are_told_apart(model, tower):
    prompt = "<image> or <image>"
    with model.trace() as tracer:
        tracer.invoke(prompt, lambda: None, images=[picture(0), picture(1)])
        with tracer.invoke(prompt, images=[picture(2), picture(3)]):
            patches = model[tower].hidden
    with model.trace(prompt, images=[picture(2), picture(3)]):
        assert same(patches, model[tower].hidden)


def test_images_that_cannot_be_told_apart_are_refused_and_run_one_by_one(model):
    def run(**options):
        with model.trace(**options) as tracer:
            with tracer.invoke("<image> or <image>", images=[picture(0), picture(1)]):
                one = model.lm_head.output
            with tracer.invoke(PROMPT, images=picture(2)):
                other = model.lm_head.output
        return one, other

    with pytest.raises(BatchError) as caught:
        run()
    happened, instead = str(caught.value).splitlines()
    assert happened == (
        "The images of the inputs cannot be told apart in one batch: `pixel_values` is [2, 3, 16, 16], [1, 3, 16, 16]."
    )
    assert instead.endswith("`model.trace(batched=False)`.")
    one, other = run(batched=False)
    assert same(other, model.trace(PROMPT, images=picture(2)).result.logits)
    assert one.shape[1] > other.shape[1]


def test_a_prompt_with_an_image_and_one_without_are_refused(model):
    with pytest.raises(BatchError, match=r"`pixel_values` is \[1, 3, 16, 16\], none"), model.trace() as tracer:
        tracer.invoke(PROMPT, lambda: None, images=picture(0))
        tracer.invoke("Paris", lambda: None)


def test_images_need_a_text_and_a_processor(model, tokenizer):
    with pytest.raises(InputError, match="was given `images=` and no text"):
        model.trace(images=picture(0))
    bare = VisionLanguageModel(model._module)
    with pytest.raises(InputError, match="it has no processor for them"):
        bare.trace(PROMPT, images=picture(0))
    assert bare.trace([1, 2, 3]).result.logits.shape[1] == 3
    given = VisionLanguageModel(model._module, processor=model.processor)
    assert given.trace(PROMPT, images=picture(0)).result.logits.shape[0] == 1


def test_a_folder_without_a_processor_is_a_sentence(tmp_path):
    with pytest.raises(LoadError, match=r"The processor of `.*` cannot be loaded: "):
        VisionLanguageModel(tmp_path)


def test_a_model_that_gives_image_tokens_three_positions_counts_them_itself():
    """Left-padded, each row gives what it gives alone; positions counted by us would be those of text."""
    module = small_vision.qwen2_vl()
    model = VisionLanguageModel(module)
    torch.manual_seed(0)
    image, pixels = module.config.image_token_id, torch.randn(2, 16, 96)
    grid = torch.tensor([[1, 4, 4]])
    rows = [[61, image, image, image, image, 62, 63, 64], [65, image, image, image, image]]
    batch = {
        "input_ids": torch.tensor([rows[0], [0] * 3 + rows[1]]),
        "attention_mask": torch.tensor([[1] * 8, [0] * 3 + [1] * 5]),
        "pixel_values": pixels.flatten(0, 1),
        "image_grid_thw": grid.expand(2, 3),
    }
    kinds = (batch["input_ids"] == image).long()
    takes = {"mm_token_type_ids"} & model._takes
    logits = model.trace(batch, **dict.fromkeys(takes, kinds)).result.logits
    for row, ids in enumerate(rows):
        own = torch.tensor([ids])
        kind = dict.fromkeys(takes, (own == image).long())
        alone = module(input_ids=own, pixel_values=pixels[row], image_grid_thw=grid, **kind).logits[0]
        assert same(logits[row, -len(ids) :], alone)


def test_images_of_several_sizes_in_one_tensor_are_never_taken_for_rows():
    """Patches of all images in one row of them: told apart only where every prompt has as many."""
    images = SimpleNamespace(model_input_names=["pixel_values", "image_grid_thw"])
    processor = SimpleNamespace(image_processor=images, tokenizer=SimpleNamespace(pad_token_id=0))
    model = VisionLanguageModel(small_vision.qwen2_vl(), processor=processor)
    image = model.config.image_token_id
    block = "model.visual.blocks.0"

    def given(patches, tokens):
        ids = torch.tensor([[61] + [image] * tokens + [62]])
        kinds = dict.fromkeys({"mm_token_type_ids"} & model._takes, (ids == image).long())
        grid = torch.tensor([[1, 4, patches // 4]])
        return {"input_ids": ids, "pixel_values": torch.randn(patches, 96), "image_grid_thw": grid, **kinds}

    with pytest.raises(BatchError, match=r"`pixel_values` is \[16, 96\], \[32, 96\]"), model.trace() as tracer:
        tracer.invoke(lambda: None, **given(16, 4))
        tracer.invoke(lambda: None, **given(32, 8))
    one, other = given(16, 4), given(16, 4)
    with model.trace(**other):
        expected = model[block].hidden
    with model.trace() as tracer:
        tracer.invoke(lambda: None, **one)
        with tracer.invoke(**other):
            patches = model[block].hidden
            with pytest.raises(RowsError):  # merged patches are fewer, and no size tells whose they are
                model.model.visual.merger.output
    assert same(patches, expected)
