"""What a small model is called with, told by the keywords of its forward and the sizes in its configuration."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

ROWS, LENGTH, FIRST_WORD, AFTER_WORDS = 2, 7, 60, 90


def inputs_for(module: torch.nn.Module, architecture: str = "") -> dict[str, Any]:
    """The keywords of one call on two rows."""
    torch.manual_seed(1)
    takes = inspect.signature(module.forward).parameters
    given = {name: make(module.config) for name, make in MAKERS.items() if name in takes}
    given |= MORE[architecture](module.config) if architecture in MORE else {}
    given = {name: value for name, value in given.items() if value is not None}
    if getattr(module.config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        given["decoder_input_ids"] = words(5)
    image = image_token(module.config)
    if image is not None and {"input_ids", "pixel_values"} <= given.keys() and hasattr(module, "get_image_features"):
        given |= with_images(module, given, image)
    return given


def words(length: int = LENGTH) -> torch.Tensor:
    """Ids that stand for nothing special."""
    return torch.randint(FIRST_WORD, AFTER_WORDS, (ROWS, length))


def found(config: Any, *names: str) -> Any:
    """The first of these fields that the configuration, or one inside it, has."""
    for part in (config, *parts(config)):
        for name in names:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return None


def parts(config: Any) -> Iterator[Any]:
    """The configurations inside a configuration."""
    for name in getattr(config, "sub_configs", ()):
        if (part := getattr(config, name, None)) is not None:
            yield part
            yield from parts(part)


def images(config: Any) -> torch.Tensor:
    size = found(config, "image_size", "img_size", "input_size") or 64
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.randn(ROWS, found(config, "num_channels", "in_channels") or 3, height, width)


def spectrogram(config: Any) -> torch.Tensor:
    bins = found(config, "num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim") or 16
    return torch.randn(ROWS, bins, 2 * (found(config, "max_source_positions") or 32))


def sound(config: Any) -> torch.Tensor:
    return torch.randn(ROWS, 800)


def boxes(config: Any) -> torch.Tensor:
    corner = torch.randint(0, 30, (ROWS, LENGTH, 2))
    return torch.cat([corner, corner + 5], -1)


MAKERS: dict[str, Callable[[Any], torch.Tensor]] = {
    "input_ids": lambda config: words(),
    "pixel_values": images,
    "input_features": spectrogram,
    "input_values": sound,
    "bbox": boxes,
}


def video(config: Any) -> dict[str, Any]:
    return {"pixel_values": torch.randn(ROWS, config.num_frames, 3, config.image_size, config.image_size)}


def tiles(config: Any) -> dict[str, Any]:
    """An image as a whole and its one tile."""
    return {"pixel_values": torch.randn(ROWS, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * ROWS)}


def frames(config: Any) -> dict[str, Any]:
    """A spectrogram with the bins last."""
    return {"input_features": torch.randn(ROWS, 32, 16)}


def series(config: Any) -> dict[str, Any]:
    length = config.context_length + max(config.lags_sequence)
    return {
        "past_values": torch.randn(ROWS, length),
        "past_time_features": torch.randn(ROWS, length, config.num_time_features),
        "past_observed_mask": torch.ones(ROWS, length),
        "future_values": torch.randn(ROWS, config.prediction_length),
        "future_time_features": torch.randn(ROWS, config.prediction_length, config.num_time_features),
    }


# What the signature does not tell.
MORE: dict[str, Callable[[Any], dict[str, Any]]] = {
    "timesformer": video,
    "videomae": video,
    "vivit": video,
    "xclip": lambda config: {"pixel_values": torch.randn(ROWS, config.vision_config.num_frames, 3, 16, 16)},
    "parakeet_ctc": frames,
    "wav2vec2-bert": frames,
    "seamless_m4t": frames,
    "speech_to_text": frames,
    "audio-spectrogram-transformer": lambda config: {"input_values": torch.randn(ROWS, 32, 16)},
    "moonshine": lambda config: {"input_values": torch.randn(ROWS, 4000)},
    "dac": lambda config: {"input_values": torch.randn(ROWS, 1, 800)},
    "encodec": lambda config: {"input_values": torch.randn(ROWS, 1, 800)},
    "mimi": lambda config: {"input_values": torch.randn(ROWS, 1, 4000)},
    "autoformer": series,
    "informer": series,
    "time_series_transformer": series,
    "patchtst": lambda config: {"past_values": torch.randn(ROWS, config.context_length, 1)},
    "patchtsmixer": lambda config: {"past_values": torch.randn(ROWS, config.context_length, 1)},
    "decision_transformer": lambda config: {
        "states": torch.randn(ROWS, 3, config.state_dim),
        "actions": torch.randn(ROWS, 3, config.act_dim),
        "rewards": torch.randn(ROWS, 3, 1),
        "returns_to_go": torch.randn(ROWS, 3, 1),
        "timesteps": torch.arange(3).expand(ROWS, 3),
        "attention_mask": torch.ones(ROWS, 3),
    },
    "bros": lambda config: {"bbox": torch.rand(ROWS, LENGTH, 4)},
    "lxmert": lambda config: {
        "visual_feats": torch.randn(ROWS, 3, config.visual_feat_dim),
        "visual_pos": torch.rand(ROWS, 3, config.visual_pos_dim),
    },
    "siglip2": lambda config: {
        "pixel_values": torch.randn(ROWS, 16, 48),
        "pixel_attention_mask": torch.ones(ROWS, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * ROWS),
    },
    "lfm2_vl": lambda config: {
        "pixel_values": torch.randn(ROWS, 16, 48),
        "pixel_attention_mask": torch.ones(ROWS, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * ROWS),
    },
    "pix2struct": lambda config: {"flattened_patches": torch.cat([torch.ones(ROWS, 4, 2), torch.randn(ROWS, 4, 32)], -1)},
    "mllama": lambda config: {
        "pixel_values": torch.randn(ROWS, 1, 4, 3, 16, 16),
        "aspect_ratio_ids": torch.ones(ROWS, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(ROWS, 1, 4, dtype=torch.long),
        "cross_attention_mask": torch.ones(ROWS, LENGTH, 1, 4, dtype=torch.long),
    },
    "idefics": lambda config: {
        "pixel_values": torch.randn(ROWS, 1, 3, 16, 16),
        "image_attention_mask": torch.ones(ROWS, LENGTH, 1),
    },
    "instructblip": lambda config: {"qformer_input_ids": words(4)},
    "fuyu": lambda config: {"pixel_values": None},
    "llava_next": tiles,
    "llava_next_video": tiles,
    "llava_onevision": tiles,
    "colpali": lambda config: {"input_ids": with_image_tokens(words(), config, 16)},
    "colqwen2": lambda config: {
        "input_ids": with_image_tokens(words(), config, 4),
        "pixel_values": torch.randn(ROWS, 16, 96),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * ROWS),
    },
    "sam": lambda config: {"input_points": torch.rand(ROWS, 1, 2, 2) * 16},
}


IMAGES = ("pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask", "spatial_shapes", "qformer_input_ids")


def image_token(config: Any) -> int | None:
    return found(config, "image_token_id", "image_token_index")


def with_image_tokens(ids: torch.Tensor, config: Any, count: int) -> torch.Tensor:
    return torch.cat([torch.full((ROWS, count), image_token(config)), ids], 1)


def required(function: Callable[..., Any], name: str) -> bool:
    """Whether the function cannot be called without this."""
    parameter = inspect.signature(function).parameters.get(name)
    return parameter is not None and parameter.default is parameter.empty


def with_images(module: torch.nn.Module, given: dict[str, Any], token: int) -> dict[str, Any]:
    """The ids with as many image tokens as the model makes of an image."""
    vision = found(module.config, "vision_config") or module.config
    takes = inspect.signature(module.forward).parameters
    if "image_grid_thw" in takes:
        sides = [getattr(vision, "temporal_patch_size", 1), vision.patch_size, vision.patch_size]
        channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", 3)
        grid = torch.tensor([[1, 4, 4]] * ROWS)
        given = given | {
            "pixel_values": torch.randn(ROWS * 16, channels * sides[0] * sides[1] * sides[2]),
            "image_grid_thw": grid,
        }
    elif required(module.get_image_features, "image_sizes") and "image_sizes" not in given:
        given = given | {"image_sizes": torch.tensor([given["pixel_values"].shape[-2:]] * ROWS)}
    images = {name: given[name] for name in IMAGES if name in given}
    with torch.no_grad():
        try:
            made = module.get_image_features(**images)
        except ValueError:  # several images, or parts of one, for each row
            given["pixel_values"] = images["pixel_values"] = images["pixel_values"].unsqueeze(1)
            made = module.get_image_features(**images)
    if not isinstance(made, (torch.Tensor, list, tuple)):
        made = made.last_hidden_state if made.pooler_output is None else made.pooler_output
    total = sum(each.reshape(-1, each.shape[-1]).shape[0] for each in made)
    ids = with_image_tokens(given["input_ids"], module.config, total // ROWS)
    kinds = {name: (ids == token).long() for name in ("mm_token_type_ids",) if name in takes}
    return given | {"input_ids": ids} | kinds
