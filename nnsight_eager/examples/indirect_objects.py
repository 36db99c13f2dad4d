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
    clean, corrupt, right, wrong = [], [], [], []
    for first, second, place, thing in SCENES[:scenes]:
        said = [TEMPLATE.format(a=first, b=second, subject=name, place=place, thing=thing) for name in (second, first)]
        clean += said
        corrupt += reversed(said)
        right += [first, second]
        wrong += [second, first]
    ids = [model.tokenizer(text).input_ids for text in (*clean, *corrupt)]
    names = [model.tokenizer(f" {name}", add_special_tokens=False).input_ids for name in (*right, *wrong)]
    if len({*map(len, ids)}) > 1 or {*map(len, names)} != {1}:
        raise InputError(
            "The model's tokenizer splits the prompts' words, so that positions of clean and corrupt prompts do not agree.",
            "Choose another model, or fewer prompts with `--scenes`.",
        )
    differing = next(place for place, (a, b) in enumerate(zip(ids[0], ids[len(clean)], strict=True)) if a != b)
    answers = torch.tensor(names).flatten().view(2, -1)
    return Prompts(clean, corrupt, *answers, [model.tokenizer.decode([token]) for token in ids[0]], differing)
