"""Tiny models of images and text with their processors, made of parts: nothing here comes from the hub.

folder = saved("llava", path, tokenizer)
"""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures.shrinking import shrunken
from PIL import Image

CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}; {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def picture(seed: int, width: int = 20, height: int = 24) -> Image.Image:
    """An image of noise."""
    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def image_processor(name: str, **options: Any) -> Any:
    """The image processor that needs no torchvision: transformers 5 calls it `…Pil`."""
    return (getattr(transformers, f"{name}Pil", None) or getattr(transformers, name))(**options)


def with_image_token(tokenizer: Any) -> Any:
    """A copy of a tokenizer that knows `<image>`."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


def llava(tokenizer: Any) -> tuple[torch.nn.Module, Any]:
    """One image of 16 tokens for each `<image>`."""
    images = image_processor("CLIPImageProcessor", size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = transformers.LlavaProcessor(
        images,
        with_image_token(tokenizer),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    token = processor.tokenizer.convert_tokens_to_ids("<image>")
    text = {"vocab_size": len(processor.tokenizer), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = shrunken("llava", image_token_index=token, text_config=text)
    return with_weights(transformers.LlavaForConditionalGeneration(config)), processor


def qwen2_vl() -> torch.nn.Module:
    """A model whose tokens have three positions each."""
    sections = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {"rope_parameters": sections, "rope_scaling": sections}
    config = shrunken("qwen2_vl", text_config=text, vision_config={"hidden_size": 32, "embed_dim": 32})
    return with_weights(transformers.Qwen2VLForConditionalGeneration(config))


def with_weights(module: torch.nn.Module) -> torch.nn.Module:
    """Weights by which the tokens are not equally likely."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


def saved(path: Path, tokenizer: Any) -> Path:
    """A folder with the small LLaVA and its processor."""
    module, processor = llava(tokenizer)
    module.save_pretrained(path)
    processor.save_pretrained(path)
    return path
