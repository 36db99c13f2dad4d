"""One row for each architecture: what was looked at in it, and what was found.

row = looked_at(family, "llama", zeroed=12)
row.result, row.why_not
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .catalogue import FAMILIES, Family, built
from .checking import Checks
from .inputs import inputs_for


class Row(NamedTuple):
    """What was found in one architecture."""

    architecture: str
    family: str
    model: str
    modules: int
    compared: int
    zeroed: int
    patterns: int
    steps: int
    result: str
    why_not: str


def architectures() -> Iterator[tuple[Family, str]]:
    """Those that this version of transformers has."""
    for family in FAMILIES:
        for name in family.architectures.split():
            if name in CONFIG_MAPPING_NAMES and hasattr(transformers, family.loaded_by):
                yield family, name


def looked_at(family: Family, architecture: str, zeroed: int) -> Row:
    """The row of an architecture, of whose modules at most so many are zeroed, one after another."""
    try:
        module = built(family, architecture)
        inputs = inputs_for(module, architecture)
        with torch.no_grad():
            module(**inputs)
    except Exception as error:  # the small configuration is not one that this version can run
        said = str(error).strip().splitlines() or [""]
        return Row(architecture, family.name, "", 0, 0, 0, 0, 0, "not run", f"{type(error).__name__}: {said[0]}")
    checks = Checks(module, inputs)
    checks.forward(zeroed)
    if isinstance(module, transformers.GenerationMixin) and module.can_generate():
        with torch.no_grad():
            checks.generation()
    found = checks.found
    why_not = "; ".join((found.problems or found.notes)[:3])
    return Row(
        architecture,
        family.name,
        type(module).__name__,
        found.modules,
        found.compared,
        found.zeroed,
        found.patterns,
        found.steps,
        "differs" if found.problems else "equal",
        why_not,
    )
