"""Prompts on which one name must be told from another: indirect object identification (Wang et al. 2022, arXiv:2211.00593).

When Mary and John went to the store, John gave a drink to      →  Mary

The corrupt prompt names the other one as the subject, and the answer becomes the other name; nothing else differs.
"""

from typing import NamedTuple

import torch

from nnsight_eager import InputError, LanguageModel

TEMPLATE = "When {a} and {b} went to the {place}, {subject} gave a {thing} to"
SCENES = (
    ("Mary", "John", "store", "drink"),
    ("Tom", "James", "garden", "book"),
    ("Anna", "Mark", "restaurant", "ring"),
    ("Sarah", "Paul", "school", "snack"),
    ("Lucy", "David", "office", "flower"),
    ("Kate", "Peter", "park", "ball"),
    ("Alice", "Jack", "store", "drink"),
    ("Jane", "Robert", "garden", "book"),
)


class Prompts(NamedTuple):
    """Clean and corrupt prompts row by row, and the ids of the names that answer them."""

    clean: list[str]
    corrupt: list[str]
    right: torch.Tensor
    """`[row]`: the answer to the clean prompt."""
    wrong: torch.Tensor
    """`[row]`: the answer to the corrupt prompt."""
    tokens: list[str]
    """The tokens of the first clean prompt; all prompts have as many."""
    subject: int
    """The position where clean and corrupt prompts differ: the subject's second mention, S2."""

    def preference(self, logits: torch.Tensor) -> torch.Tensor:
        """The logit of the right name less that of the wrong one, mean over rows; `logits` are `[row, seq, vocabulary]`."""
        rows = torch.arange(len(logits))
        return (logits[rows, -1, self.right] - logits[rows, -1, self.wrong]).mean()


def prompts(model: LanguageModel, scenes: int) -> Prompts:
    """The prompts of the first so many scenes, two for each: either name is once the answer.

    Raises `InputError` where the tokenizer splits a name, or the prompts have not the same length.
    """
    clean: list[str] = []
    names: list[str] = []
    for first, second, place, thing in SCENES[:scenes]:
        clean += [TEMPLATE.format(a=first, b=second, subject=name, place=place, thing=thing) for name in (second, first)]
        names += [first, second]
    ids = torch.tensor(_ids(model, clean))
    answers = torch.tensor(_ids(model, [f" {name}" for name in names]))
    if answers.shape[1] != 1:
        raise _split()
    twin = torch.arange(len(clean)) ^ 1  # rows 0 and 1 are each other's twin, 2 and 3, and so on
    return Prompts(
        clean,
        [clean[row] for row in twin],
        right=answers[:, 0],
        wrong=answers[twin, 0],
        tokens=[model.tokenizer.decode([token]) for token in ids[0].tolist()],
        subject=int((ids[0] != ids[1]).nonzero()[0]),
    )


def _ids(model: LanguageModel, texts: list[str]) -> list[list[int]]:
    """The texts' tokens, as many for each."""
    ids: list[list[int]] = model.tokenizer(texts, add_special_tokens=False).input_ids
    if len({*map(len, ids)}) != 1:
        raise _split()
    return ids


def _split() -> InputError:
    return InputError(
        "The model's tokenizer splits words of the prompts, so that what they have at one position is not the same.",
        "Choose another model, or fewer scenes with `--scenes`.",
    )
