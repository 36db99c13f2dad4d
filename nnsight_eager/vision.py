"""`VisionLanguageModel`: text and images through the model's processor.

model = VisionLanguageModel("llava-hf/llava-1.5-7b-hf", device_map="auto")
with model.trace("USER: <image>\nWhat is this? ASSISTANT:", images=picture):
    hidden = model.model.language_model.layers[5].hidden     # tokens of the image and of the text, [batch, seq, hidden]
    patches = model.model.vision_tower.output                # what the image became
"""

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import Any, Final

import torch

from .batching import Given
from .errors import BatchError, InputError
from .inputs import for_tokenizer, is_message
from .language import LanguageModel
from .loading import processor_for
from .padding import FILLS, together
from .trace import Trace

MEDIA: Final = ("images", "videos")
"""Keywords that are the processor's."""


class VisionLanguageModel(LanguageModel):
    """A transformers model of images and text: what is given goes through its processor."""

    processor: Any = None
    """The processor: a tokenizer and an image processor."""

    def __init__(
        self, name_or_path_or_module: str | PathLike[str] | torch.nn.Module, processor: Any = None, **options: Any
    ) -> None:
        """Wrap a loaded module, or a model by its name or folder, whose weights are loaded at the first run.

            model = VisionLanguageModel("llava-hf/llava-1.5-7b-hf")
            model = VisionLanguageModel(hf_model, processor=hf_processor)

        Options are those of `LanguageModel`. Raises `LoadError` where there is no such model, or no processor.
        """
        if processor is None and isinstance(name_or_path_or_module, (str, PathLike)):
            processor = processor_for(fspath(name_or_path_or_module), options)
        self.processor = processor
        options.setdefault("tokenizer", getattr(processor, "tokenizer", processor))
        super().__init__(name_or_path_or_module, **options)

    def trace(self, *inputs: Any, **keywords: Any) -> Trace:
        """Run one forward pass with its insides open.

            with model.trace("<image> What is this?", images=picture):
                hidden = model.model.language_model.layers[5].hidden
            question = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
            with model.trace([{"role": "user", "content": question}]):
                logits = model.lm_head.output

        The input is text with the processor's image token where an image belongs, a list of texts, or chat messages, which may
        hold their images; `images=` is an image, a list, or a list for each text, in the forms the processor takes (PIL images,
        arrays, tensors). What `LanguageModel` takes is taken too: ids, encodings, `pixel_values=`.

        In invokes each prompt has as many images of one size as the others, so that it is known which are whose; otherwise
        `batched=False` gives each a forward pass of its own.
        """
        return super().trace(*inputs, **keywords)

    def batch(self, inputs: Sequence[Given]) -> tuple[Given, list[int]]:
        """How the inputs of several invokes become one call: text is padded, images are joined in the order of the prompts.

        Raises `BatchError` where prompts differ in the number or size of their images.
        """
        each_prepared = [self._prepare(each.args, each.kwargs) for each in inputs]
        media = {name for each in each_prepared for name in each if name in self._media_names}
        if not media:
            return super().batch(inputs)
        texts = [{name: value for name, value in each.items() if name not in media} for each in each_prepared]
        prepared, sizes = together(texts, self._side, self._pad)
        for name in sorted(media):
            prepared[name] = joined_media(name, [each.get(name) for each in each_prepared], sizes)
        return Given((), prepared), sizes

    def _traced(self, name: str, inputs: tuple[Any, ...], keywords: dict[str, Any], batched: bool) -> Trace:
        given = next((each for each in MEDIA if keywords.get(each) is not None), None)
        if given is not None and not inputs:
            raise InputError(
                f"The model was given `{given}=` and no text.",
                'Pass the prompt with them: `model.trace("<image> What is this?", images=picture)`; an invoke takes both too.',
            )
        return super()._traced(name, inputs, keywords, batched)

    def _prepare(self, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Any]:
        """What a user has passed, as the keywords of a call: images and chats go through the processor."""
        media = {name: keywords[name] for name in MEDIA if keywords.get(name) is not None}
        others = {name: value for name, value in keywords.items() if name not in MEDIA}
        chats = chats_in(inputs)
        if not media and not chats:
            return super()._prepare(inputs, others)
        self._require_processor()
        tokenizing, others = for_tokenizer(others)
        texts = self._written(chats) if chats else inputs[0]
        if chats and not media:
            media = {"images": found} if any(found := [images_in(chat) for chat in chats]) else {}
        texts = [texts] if isinstance(texts, str) else list(texts)
        return {**self._processed(texts, media, tokenizing), **others}

    def _written(self, chats: list[list[Any]]) -> list[str]:
        """Chats as text; one that ends with the assistant is gone on with."""
        if not getattr(self.processor, "chat_template", None):
            raise InputError(
                "The model was given chat messages, and its processor has no chat template.",
                "Pass the text of the conversation as one string, or set `model.processor.chat_template`.",
            )
        return [
            self.processor.apply_chat_template(
                chat,
                add_generation_prompt=chat[-1]["role"] != "assistant",
                continue_final_message=chat[-1]["role"] == "assistant",
            )
            for chat in chats
        ]

    def _processed(self, texts: list[str], media: dict[str, Any], tokenizing: dict[str, Any]) -> dict[str, Any]:
        """Texts and images as tensors; it is we who pad, on the model's side."""
        import transformers

        encoded = self.processor(text=texts, **media, **tokenizing)
        taken = {name: value for name, value in encoded.items() if name in self._takes and value is not None}
        lengths = [len(row) for row in taken["input_ids"]]
        tokens = {name: value for name, value in taken.items() if name in FILLS or _lengths(value) == lengths}
        others = {name: value for name, value in taken.items() if name not in tokens}
        return self._inputs.encoding(tokens) | dict(transformers.BatchFeature(others, tensor_type="pt"))

    @property
    def _media_names(self) -> frozenset[str]:
        """The keywords of the model that hold images, by the parts of the processor that make them."""
        parts = (getattr(self.processor, name, None) for name in ("image_processor", "video_processor"))
        return frozenset(name for part in parts for name in getattr(part, "model_input_names", ())) - FILLS.keys()

    def _require_processor(self) -> None:
        if getattr(self.processor, "image_processor", None) is None:
            raise InputError(
                "The model was given images or messages, and it has no processor for them.",
                "Give it: `VisionLanguageModel(module, processor=processor)`.",
            )


def chats_in(inputs: tuple[Any, ...]) -> list[list[Any]]:
    """The chats a user has passed: one message, one chat or several; none where it is something else."""
    given = inputs[0] if len(inputs) == 1 else None
    if is_message(given):
        return [[given]]
    if not isinstance(given, (list, tuple)) or not given:
        return []
    if is_message(given[0]):
        return [list(given)]
    if isinstance(given[0], (list, tuple)) and given[0] and is_message(given[0][0]):
        return [list(chat) for chat in given]
    return []


def images_in(chat: list[Any]) -> list[Any]:
    """The images that are in the messages of a chat, in their order; addresses and paths are opened by the processor."""
    parts = [part for message in chat if isinstance(message["content"], (list, tuple)) for part in message["content"]]
    images = [part for part in parts if part.get("type") == "image"]
    found = [next((part[key] for key in ("image", "url", "path") if key in part), None) for part in images]
    return [image for image in found if image is not None]


def joined_media(name: str, values: Sequence[Any], rows: Sequence[int]) -> torch.Tensor:
    """The images of all inputs, in the order of their prompts; as many for each row, since that is how rows are told."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    fits = len(tensors) == len(values) and len({each.shape[1:] for each in tensors}) == 1
    if not fits or len({len(each) / count for each, count in zip(tensors, rows, strict=True)}) > 1:
        shapes = ", ".join(str(list(each.shape)) if isinstance(each, torch.Tensor) else "none" for each in values)
        raise BatchError(
            f"The images of the inputs cannot be told apart in one batch: `{name}` is {shapes}.",
            "Give each prompt as many images of one size, or each a forward pass of its own: `model.trace(batched=False)`.",
        )
    return torch.cat(tensors)


def _lengths(value: Any) -> list[int] | None:
    """The lengths of the rows of a list of lists."""
    listed = isinstance(value, list) and all(isinstance(row, list) for row in value)
    return [len(row) for row in value] if listed else None
