"""What a user passes to a language model, as keywords the model can be called with.

    Inputs(tokenizer, side="left", pad=0, takes={"input_ids", "attention_mask"}).prepare(("The Eiffel Tower",), {})
    # {"input_ids": [1, 4], "attention_mask": [1, 4]}

Text, lists of text, chat messages, ids in any nesting, tensors and encodings all become rows of equal length. Shorter rows are
padded on the side the model wants, with a mask that says so.
"""

from collections.abc import Container, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import torch

from .errors import EmptyInputError, InputError, MaskError, TokenizerMissingError
from .padding import CONTENT, FILLS, Side, lengths_differ

Row = list[int]

TOKENIZING: Final = ("truncation", "add_special_tokens")
"""Keywords of the tokenizer that no model takes; beside `truncation`, `max_length` is the tokenizer's too."""


class Inputs(NamedTuple):
    """How one model wants its inputs: the tokenizer, if any, the side to pad on, the id to pad with, the keywords it takes.

    `main` is the keyword that a tensor is meant for where the model runs on something else than tokens: `pixel_values`.
    """

    tokenizer: Any
    side: Side
    pad: int | None
    takes: Container[str]
    main: str = CONTENT[0]

    def prepare(self, given: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Any]:
        """The keywords for the call, from at most one positional input and the keywords beside it."""
        if len(given) > 1:
            raise InputError(
                f"The model was given {len(given)} inputs; it takes one.",
                'Pass several prompts as a list: `model.trace(["one", "two"])`.',
            )
        if given and any(keywords.get(name) is not None for name in CONTENT):
            raise InputError(
                "The model was given an input and `input_ids=` or `inputs_embeds=` as well; it takes one of them.",
                "Pass the prompt alone, or the keyword alone.",
            )
        tokenizing, prepared = for_tokenizer(keywords)
        if tokenizing and not (given and _is_text(given[0])):
            raise InputError(
                f"`{next(iter(tokenizing))}=` is for the tokenizer, and the model was given no text.",
                "Pass text, or leave it away.",
            )
        if given:
            prepared = {**(self.text(given[0], tokenizing) if tokenizing else self.encode(given[0])), **prepared}
        if isinstance(prepared.get("input_ids"), (list, tuple)):
            prepared |= self.rows(prepared["input_ids"], keep_mask=prepared.get("attention_mask") is not None)
        if isinstance(prepared.get("attention_mask"), (list, tuple)):
            prepared["attention_mask"] = self._padded(_rows(prepared["attention_mask"]), 0)
        check(prepared)
        return prepared

    def encode(self, given: Any) -> dict[str, Any]:
        """The input's tensors, by the keyword of the model they belong to."""
        if given is None:
            raise EmptyInputError("The model was given `None` to run on.", 'Pass a prompt: `model.trace("The Eiffel Tower")`.')
        if isinstance(given, str):
            return self.text(given)
        if hasattr(given, "__array__"):
            given = torch.as_tensor(given)
        if isinstance(given, torch.Tensor):
            return self.ids(given) if self.main in CONTENT else {self.main: given}
        if isinstance(given, Mapping):
            return self.chats([[given]]) if is_message(given) else self.encoding(given)
        if not isinstance(given, Sequence) or isinstance(given, (bytes, bytearray)):
            raise _not_an_input(given)
        if not given:
            raise _empty("[]")
        first = given[0]
        if isinstance(first, str):
            return self.text(given)
        if is_message(first):
            return self.chats([list(given)])
        if isinstance(first, Sequence) and first and is_message(first[0]):
            return self.chats([list(chat) for chat in given])
        if isinstance(first, (int, torch.Tensor, Sequence)) and not isinstance(first, bool):
            return self.rows(given)
        raise _not_an_input(given)

    def text(self, given: Any, tokenizing: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
        """One text or several, tokenized."""
        texts = [given] if isinstance(given, str) else list(given)
        strange = next((text for text in texts if not isinstance(text, str)), None)
        if strange is not None:
            raise _not_an_input(strange)
        encoded = self._tokenizer("text")(texts, **tokenizing)
        empty = next((text for text, row in zip(texts, encoded["input_ids"], strict=True) if not len(row)), None)
        if empty is not None:
            raise _empty(repr(empty))
        return self.encoding(self._taken(encoded))

    def chats(self, chats: list[list[Any]]) -> dict[str, Any]:
        """Chat messages through the tokenizer's chat template; a chat that ends with the assistant is gone on with."""
        tokenizer = self._tokenizer("chat messages")
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                "The model was given chat messages, and its tokenizer has no chat template.",
                "Pass the text of the conversation as one string, or set `model.tokenizer.chat_template`.",
            )
        encoded = [
            tokenizer.apply_chat_template(
                chat,
                tokenize=True,
                return_dict=True,
                add_generation_prompt=chat[-1]["role"] != "assistant",
                continue_final_message=chat[-1]["role"] == "assistant",
            )
            for chat in chats
        ]
        return self.encoding(self._taken({name: [each[name] for each in encoded] for name in encoded[0]}))

    def encoding(self, encoded: Mapping[str, Any]) -> dict[str, Any]:
        """An encoding or a dict of keywords; lists in it become padded tensors."""
        found = {name: value for name, value in encoded.items() if value is not None}
        ids = found.get("input_ids")
        if ids is None or isinstance(ids, torch.Tensor):
            return found
        rows = _rows(ids)
        padded = self._together(rows, keep_mask="attention_mask" in found)
        lengths = [*map(len, rows)]
        for name in found.keys() - {"input_ids"}:
            value = found[name]
            of_tokens = _rows(value) if isinstance(value, list) else []
            padded[name] = self._padded(of_tokens, FILLS.get(name, 0)) if [*map(len, of_tokens)] == lengths else value
        return padded

    def ids(self, ids: torch.Tensor) -> dict[str, Any]:
        """Token ids as a tensor `[seq]` or `[batch, seq]`; floating point is taken for embeddings `[batch, seq, hidden]`."""
        if not ids.numel():
            raise _empty(f"a tensor of shape {list(ids.shape)}")
        if ids.is_floating_point():
            return {"inputs_embeds": ids if ids.dim() == 3 else ids.unsqueeze(0)}
        return {"input_ids": ids if ids.dim() > 1 else ids.reshape(1, -1)}

    def rows(self, given: Any, *, keep_mask: bool = False) -> dict[str, Any]:
        """Token ids as nested lists, padded; with a mask, unless one was given."""
        return self._together(_rows(given), keep_mask=keep_mask)

    def _together(self, rows: list[Row], *, keep_mask: bool) -> dict[str, Any]:
        """The same of lists of plain numbers."""
        if not rows or not all(rows):
            raise _empty(repr(rows))
        padded = {"input_ids": self._padded(rows, self.pad)}
        if not keep_mask:
            padded["attention_mask"] = self._padded([[1] * len(row) for row in rows], 0)
        return padded

    def _taken(self, encoded: Mapping[str, Any]) -> dict[str, Any]:
        """Of what the tokenizer gives, what the model takes: many give token types to models that know none."""
        return {name: value for name, value in encoded.items() if name in self.takes}

    def _padded(self, rows: list[Row], fill: int | None) -> torch.Tensor:
        """Rows as one tensor `[batch, seq]`."""
        length = max(map(len, rows))
        if fill is None and any(len(row) != length for row in rows):
            raise lengths_differ([len(row) for row in rows])
        gaps = [[fill or 0] * (length - len(row)) for row in rows]
        return torch.tensor([gap + row if self.side == "left" else row + gap for gap, row in zip(gaps, rows, strict=True)])

    def _tokenizer(self, what: str) -> Any:
        if self.tokenizer is None:
            raise TokenizerMissingError(
                f"The model was given {what}, and it has no tokenizer.",
                "Pass token ids, or give the tokenizer: `LanguageModel(module, tokenizer=tokenizer)`.",
            )
        return self.tokenizer


def check(prepared: Mapping[str, Any]) -> None:
    """Refuse an empty input and a mask that does not fit, before the model runs."""
    content = next((prepared[name] for name in CONTENT if prepared.get(name) is not None), None)
    if not isinstance(content, torch.Tensor):
        return
    if not content.numel():
        raise _empty(f"a tensor of shape {list(content.shape)}")
    mask = prepared.get("attention_mask")
    has_past = prepared.get("past_key_values") is not None
    if isinstance(mask, torch.Tensor) and not has_past and mask.dim() <= 2 and mask.shape != content.shape[:2]:
        raise MaskError(
            f"`attention_mask` has shape {list(mask.shape)}; the input is {list(content.shape[:2])} ([batch, seq]).",
            "Give one mask value for each token, 1 to attend to it and 0 for padding.",
        )


def for_tokenizer(keywords: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keywords that say how text is tokenized, and the others."""
    names = (*TOKENIZING, "max_length") if "truncation" in keywords else TOKENIZING
    tokenizing = {name: value for name, value in keywords.items() if name in names}
    return tokenizing, {name: value for name, value in keywords.items() if name not in names}


def _is_text(given: Any) -> bool:
    return isinstance(given, str) or (isinstance(given, (list, tuple)) and bool(given) and isinstance(given[0], str))


def is_message(value: Any) -> bool:
    """Whether `value` is one message of a chat."""
    return isinstance(value, Mapping) and "role" in value


def _rows(given: Any) -> list[Row]:
    """Nested lists, tuples or tensors of ids as a list of rows."""
    rows = list(given)
    if rows and all(isinstance(each, int) or (isinstance(each, torch.Tensor) and not each.dim()) for each in rows):
        rows = [rows]
    try:
        return [[int(token) for token in row] for row in rows]
    except (TypeError, ValueError):
        raise _not_an_input(given) from None


def _empty(what: str) -> EmptyInputError:
    return EmptyInputError(
        f"The input has no tokens: {what}.", "Pass at least one token; a beginning-of-sequence token will do."
    )


def _not_an_input(given: Any) -> InputError:
    return InputError(
        f"The model was given `{type(given).__name__}`, which is not an input it knows.",
        "Pass text, a list of texts, token ids, a tensor, a dict or chat messages.",
    )
