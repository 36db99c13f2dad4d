"""A transformers model from a name or a folder: its skeleton at once, its weights when they are needed.

source = Source("openai-community/gpt2", {"revision": None})
source.skeleton()     # on the meta device: names and shapes, no weights
source.load()         # the model
"""

from typing import Any, NamedTuple

import torch

from .errors import LoadError

AUTOMODELS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_TO_SEQ_CAUSAL_LM": "AutoModelForSeq2SeqLM",
    "MASKED_LM": "AutoModelForMaskedLM",
}
# The options that say where a file is, which a configuration and a tokenizer take as well.
WHERE = ("revision", "trust_remote_code", "cache_dir", "token", "local_files_only", "subfolder")


class Source(NamedTuple):
    """Where a model comes from, and how it is to be loaded."""

    name: str
    config: Any
    automodel: Any
    options: dict[str, Any]

    def skeleton(self) -> torch.nn.Module:
        """The module tree on the meta device: every name and shape, no weights."""
        options = {key: self.options[key] for key in ("attn_implementation", "trust_remote_code") if key in self.options}
        return skeleton(self.config, **options)

    def load(self) -> torch.nn.Module:
        """The model with its weights, in evaluation mode; transformers shows its progress."""
        try:
            return self.automodel.from_pretrained(self.name, **self.options)  # type: ignore[no-any-return]
        except OSError as error:
            raise _not_found(self.name, error) from error


def source(name: str, options: dict[str, Any]) -> Source:
    """Find the model called `name`, a folder or a name on the hub, and read its configuration."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name, **_where(options))
    except (OSError, ValueError) as error:
        raise _not_found(name, error) from error
    return Source(name, config, automodel_for(config), {**options, "config": config})


def automodel_for(config: Any) -> Any:
    """The automatic class that loads the architecture its configuration names; a causal language model where it names none."""
    import transformers
    from transformers.models.auto import modeling_auto

    architecture = (getattr(config, "architectures", None) or [""])[0]
    for family, automodel in AUTOMODELS.items():
        if architecture in getattr(modeling_auto, f"MODEL_FOR_{family}_MAPPING_NAMES").values():
            return getattr(transformers, automodel)
    known = getattr(transformers, architecture, None) if architecture else None
    return transformers.AutoModelForCausalLM if known is None else _Exactly(known)


def skeleton(config: Any, **options: Any) -> torch.nn.Module:
    """The module tree that a configuration describes, on the meta device."""
    with torch.device("meta"):
        return automodel_for(config).from_config(config, **options)  # type: ignore[no-any-return]


class _Exactly:
    """One model class with the two methods of an automatic one."""

    def __init__(self, model_class: Any) -> None:
        self.from_pretrained = model_class.from_pretrained
        self.from_config = model_class._from_config


def tokenizer_for(name: str, options: dict[str, Any]) -> Any:
    """The tokenizer that belongs to the model called `name`; `None` where it has none."""
    import transformers

    try:
        found = transformers.AutoTokenizer.from_pretrained(name, **_where(options))
    except (OSError, ValueError, KeyError, ImportError):
        return None
    return found if getattr(found, "vocab_size", 1) else None  # transformers 5 makes an empty one where there are no files


def _where(options: dict[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in WHERE if key in options}


def _not_found(name: str, error: Exception) -> LoadError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return LoadError(
        f"`{name}` cannot be loaded: {reason}",
        "Give the folder of a saved model, or a model's name on the hub and a connection to it.",
    )
