"""The texts of a data set as rows of token ids, and the batches and shards they go into.

    rows = token_rows(["The Eiffel Tower", {"text": "Paris"}, [4, 5, 6]], tokenizer)
    batches = batched([len(row) for row in rows], 8192)       # [[0, 2, 1]]: numbers of rows, the longest first
    sharded(batches, [len(row) for row in rows], 100_000)     # [[[0, 2, 1]]]: batches, a list for each shard

Everything here follows from the arguments alone, so that an extraction that was killed goes on with the same batches.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .errors import EmptyInputError, InputError, TokenizerMissingError

Row = list[int]
Batch = list[int]
"""The numbers of the rows that share a forward pass."""


def token_rows(texts: Any, tokenizer: Any, column: str | None = None, max_length: int | None = None) -> list[Row]:
    """The token ids of every text, cut to `max_length` where it is given; an error names the row it is about."""
    if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
        raise InputError(f"`max_length` was given {max_length!r}.", "Give a whole number of at least 1.")
    given = [_content(each, number, column) for number, each in enumerate(_listed(texts))]
    if not given:
        raise EmptyInputError("The data set has no texts.", "Give at least one.")
    plain = [each for each in given if isinstance(each, str)]
    tokenized = iter(_tokenized(plain, tokenizer, max_length) if plain else ())
    rows = [next(tokenized) if isinstance(each, str) else _ids(each, number)[:max_length] for number, each in enumerate(given)]
    empty = next((number for number, row in enumerate(rows) if not row), None)
    if empty is not None:
        raise EmptyInputError(f"Row {empty} of the data set has no tokens: {given[empty]!r}.", "Leave empty texts out.")
    return rows


def refuse_longer(rows: Sequence[Row], limit: int | None) -> None:
    """Raise where a row is longer than the model has positions."""
    longer = next((number for number, row in enumerate(rows) if limit is not None and len(row) > limit), None)
    if longer is not None:
        raise InputError(
            f"Row {longer} of the data set has {len(rows[longer])} tokens; the model has {limit} positions.",
            f"Cut long texts with `max_length={limit}`, or split them.",
        )


def batched(lengths: Sequence[int], batch_tokens: int) -> list[Batch]:
    """Rows of like length together, at most `batch_tokens` in a batch with its padding; a longer row is alone.

    The longest rows come first: what does not fit into memory shows at once.
    """
    batches: list[Batch] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens:
            batches.append([])
        batches[-1].append(number)
    return batches


def sharded(batches: Iterable[Batch], lengths: Sequence[int], tokens: int) -> list[list[Batch]]:
    """Whole batches together, at most `tokens` in a shard, padding not counted; a larger batch is alone."""
    shards: list[list[Batch]] = []
    room = 0
    for batch in batches:
        size = sum(lengths[number] for number in batch)
        if not shards or size > room:
            shards.append([])
            room = tokens
        shards[-1].append(batch)
        room -= size
    return shards


def _listed(texts: Any) -> Iterable[Any]:
    """The rows of what was given; a sentence where going over it would not give rows, but letters or the names of columns."""
    has_rows = hasattr(texts, "__iter__") or hasattr(texts, "__getitem__")
    if not has_rows or isinstance(texts, (str, bytes, Mapping)) or hasattr(texts, "columns"):
        raise InputError(
            f"The data set is a `{type(texts).__name__}`, which is no sequence of rows.",
            "Give a list of texts, of token ids or of dicts, a `datasets.Dataset`, or one column of a table.",
        )
    # Torch's data sets need not end by themselves.
    if not hasattr(texts, "__iter__") and hasattr(texts, "__len__"):
        return (texts[number] for number in range(len(texts)))
    return texts  # type: ignore[no-any-return]


def _content(given: Any, number: int, column: str | None) -> Any:
    """The text or the ids of one row."""
    if not isinstance(given, Mapping):
        return given
    name = next((each for each in ([column] if column else ["input_ids", "text"]) if each in given), None)
    if name is None:
        wanted = f"`{column}`" if column else "`text` or `input_ids`"
        raise InputError(
            f"Row {number} of the data set has no {wanted}; it has {', '.join(f'`{key}`' for key in given)}.",
            'Name the column that holds the texts or the token ids: `column="..."`.',
        )
    return given[name]


def _tokenized(texts: list[str], tokenizer: Any, max_length: int | None) -> list[Row]:
    """Texts as the model's tokenizer has them, special tokens included."""
    if tokenizer is None:
        raise TokenizerMissingError(
            "The data set has texts, and the model has no tokenizer.",
            "Give token ids, or give the tokenizer: `LanguageModel(module, tokenizer=tokenizer)`.",
        )
    cut = {} if max_length is None else {"truncation": True, "max_length": max_length}
    return [list(row) for row in tokenizer(texts, **cut)["input_ids"]]


def _ids(given: Any, number: int) -> Row:
    """Token ids as a list."""
    try:
        return [operator.index(token) for token in (given.tolist() if hasattr(given, "tolist") else given)]
    except TypeError:
        raise InputError(
            f"Row {number} of the data set is a `{type(given).__name__}`, which is neither a text nor token ids.",
            "Give each row as text, as a list of token ids, or as a dict that has one of them.",
        ) from None
