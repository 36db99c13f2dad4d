"""Several prepared inputs as one batch of equal length, with a mask that says what is padding.

batch, sizes = together([{"input_ids": [1, 4]}, {"input_ids": [2, 7]}], side="left", pad=0)
# {"input_ids": [3, 7], "attention_mask": [3, 7]}, [1, 2]
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import torch

from .errors import BatchError, PaddingError

Side = Literal["left", "right"]

CONTENT: Final = ("input_ids", "inputs_embeds")
"""The keywords that hold what a model is run on."""
FILLS: Final = {"attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1, "labels": -100}
"""What stands in a padded place, by keyword; `labels` of -100 are left out of transformers' losses."""
ABSENT: Final = {"attention_mask": 1, "token_type_ids": 0, "labels": -100}
"""What an input that does not give a keyword stands for where another gives it."""


def together(inputs: Sequence[Mapping[str, Any]], side: Side, pad: int | None) -> tuple[dict[str, Any], list[int]]:
    """The keywords of one call on all inputs, and the number of rows of each."""
    inputs = [{name: value for name, value in each.items() if value is not None} for each in inputs]
    content = content_of(inputs)
    shapes = [each[content].shape[:2] for each in inputs]
    names = list(dict.fromkeys(name for each in inputs for name in each))
    if len({length for _, length in shapes}) > 1 and "attention_mask" not in names:
        names.append("attention_mask")
    batch = {}
    for name in names:
        values = [each.get(name, _absent(name, *shape)) for each, shape in zip(inputs, shapes, strict=True)]
        if name == "position_ids" and any(value is None for value in values):
            values = [_counted(each, *shape) if value is None else value for value, each, shape in
                      zip(values, inputs, shapes, strict=True)]  # fmt: skip
        check_rows(name, values, [rows for rows, _ in shapes])
        aligned = all(value.dim() > 1 and value.shape[1] == length for value, (_, length) in zip(values, shapes, strict=True))
        batch[name] = _padded(name, values, side if aligned else "right", pad)
    return batch, [rows for rows, _ in shapes]


def content_of(inputs: Sequence[Mapping[str, Any]]) -> str:
    """The keyword that holds what all of them run on."""
    names = [next((name for name in CONTENT if name in each), None) for each in inputs]
    for number, name in enumerate(names, 1):
        if name is None or not isinstance(inputs[number - 1][name], torch.Tensor):
            raise BatchError(
                f"Input {number} gives neither text nor `input_ids` nor `inputs_embeds`.", "Give each invoke what it runs on."
            )
        if name != names[0]:
            raise BatchError(
                f"Input 1 gives `{names[0]}` and input {number} `{name}`; one call takes only one of them.",
                "Embed the ids first (`inputs_embeds=model.get_input_embeddings()(ids)`), or use `model.trace(batched=False)`.",
            )
    return str(names[0])


def check_rows(name: str, values: Sequence[Any], rows: Sequence[int]) -> None:
    """Refuse a keyword that does not have a row for each row of its input: it would apply to all inputs."""
    for number, (value, count) in enumerate(zip(values, rows, strict=True), 1):
        if value is None:
            raise BatchError(f"`{name}` is given for some inputs only, not for input {number}.", "Give it for each input.")
        if not (isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == count):
            raise BatchError(
                f"`{name}` cannot be given for one input: it has no rows, so it would apply to all of them.",
                f"Give it to the trace: `model.trace({name}=...)`.",
            )


def lengths_differ(lengths: Sequence[int]) -> PaddingError:
    """The error for several lengths and nothing to pad them with."""
    return PaddingError(
        f"The inputs have {min(lengths)} to {max(lengths)} tokens, and there is no token to pad with.",
        "Set `model.tokenizer.pad_token`, or pass inputs of one length.",
    )


def _absent(name: str, rows: int, length: int) -> torch.Tensor | None:
    fill = ABSENT.get(name)
    return None if fill is None else torch.full((rows, length), fill)


def _counted(given: Mapping[str, Any], rows: int, length: int) -> torch.Tensor:
    """The positions of an input that gives none."""
    mask = given.get("attention_mask")
    return positions(mask) if isinstance(mask, torch.Tensor) else torch.arange(length).expand(rows, length)


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position ids `[batch, seq]` under which a left-padded row counts from its first real token."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _padded(name: str, values: Sequence[torch.Tensor], side: Side, pad: int | None) -> torch.Tensor:
    """The rows of all inputs, dimension 1 padded to the longest."""
    lengths = [value.shape[1] for value in values if value.dim() > 1]
    longest = max(lengths, default=0)
    fill = pad if name.endswith("input_ids") else FILLS.get(name.removeprefix("decoder_"), 0)
    if fill is None:
        if len(set(lengths)) > 1:
            raise lengths_differ(lengths)
        fill = 0
    rows = []
    for value in values:
        gap = longest - value.shape[1] if value.dim() > 1 else 0
        spare = (gap, 0) if side == "left" else (0, gap)
        row = torch.nn.functional.pad(value, (0, 0) * (value.dim() - 2) + spare, value=fill) if gap else value
        if name == "labels" and gap and side == "left":
            row[:, gap] = fill  # a causal model would predict it from the padding before it; alone nothing predicts it
        rows.append(row)
    if any(row.shape[1:] != rows[0].shape[1:] for row in rows):
        raise BatchError(
            f"`{name}` of the inputs cannot be put into one batch: {', '.join(str(list(value.shape)) for value in values)}.",
            "Give every input the same shape but for the first two dimensions.",
        )
    return torch.cat(rows)
