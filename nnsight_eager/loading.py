"""A transformers model from a name or a folder: its skeleton at once, its weights when they are needed.

source = Source("openai-community/gpt2", {"revision": None})
source.skeleton()     # on the meta device: names and shapes, no weights
source.load()         # the model
"""

import dataclasses
from typing import Any, NamedTuple

import torch

from .errors import LoadError

AUTOMODELS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_TO_SEQ_CAUSAL_LM": "AutoModelForSeq2SeqLM",
    "MASKED_LM": "AutoModelForMaskedLM",
    "IMAGE_TEXT_TO_TEXT": "AutoModelForImageTextToText",
}
# The options that say where a file is, which a configuration and a tokenizer take as well.
WHERE = ("revision", "trust_remote_code", "cache_dir", "token", "local_files_only", "subfolder")

# The options that divide a model among ranks.
DIVIDING = ("tp_plan", "tp_size", "distributed_config")


class Source(NamedTuple):
    """Where a model comes from, and how it is to be loaded."""

    name: str
    config: Any
    automodel: Any
    options: dict[str, Any]

    def skeleton(self) -> torch.nn.Module:
        """The module tree on the meta device: every name and shape, no weights."""
        options = {key: self.options[key] for key in ("attn_implementation", "trust_remote_code") if key in self.options}
        with torch.device("meta"):
            try:
                return self.automodel.from_config(self.config, **options)  # type: ignore[no-any-return]
            except ValueError as error:
                raise LoadError(
                    f"`{self.name}` is a `{self.config.model_type}` model, and the class is for others: {first_line(error)}",
                    "Give a class that knows it: `automodel=transformers.AutoModelForMaskedLM`, say.",
                ) from error

    def load(self) -> torch.nn.Module:
        """The model with its weights, in evaluation mode; transformers shows its progress."""
        try:
            return self.automodel.from_pretrained(self.name, **divided(self.options))  # type: ignore[no-any-return]
        except OSError as error:
            raise _not_found(self.name, error) from error
        except ValueError as error:
            if not set(DIVIDING) & self.options.keys():
                raise
            raise LoadError(
                f"`{self.name}` cannot be divided among ranks: {str(error).strip().splitlines()[0]}",
                "Leave `tp_plan` away, or give a plan of your own: `distributed_config=DistributedConfig(tp_plan={...})`.",
            ) from error


def divided(options: dict[str, Any]) -> dict[str, Any]:
    """The options with a plan by itself, as transformers 4 and 5.0 take it, in the configuration that later ones want."""
    plan = {key: options[key] for key in ("tp_plan", "tp_size") if options.get(key) is not None}
    if not plan:
        return options
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        return options
    if not {each.name for each in dataclasses.fields(DistributedConfig)} >= plan.keys():
        return options
    rest = {key: each for key, each in options.items() if key not in ("tp_plan", "tp_size")}
    return {**rest, "distributed_config": DistributedConfig(**plan)}


def source(name: str, options: dict[str, Any], automodel: Any = None) -> Source:
    """Find the model called `name`, a folder or a name on the hub, and read its configuration.

    `automodel` is the class to load it with, or its name; without it the one that it was saved as.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name, **_where(options))
    except (OSError, ValueError) as error:
        raise _not_found(name, error) from error
    found = automodel_for(config) if automodel is None else automodel_named(automodel)
    return Source(name, config, found, {**options, "config": config})


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


def automodel_named(automodel: Any) -> Any:
    """A model class of transformers, automatic or not, itself or by its name, as an automatic one."""
    import transformers

    found = getattr(transformers, automodel, None) if isinstance(automodel, str) else automodel
    if not hasattr(found, "from_pretrained"):
        raise LoadError(
            f"`automodel={automodel!r}` is no model class of transformers {transformers.__version__}.",
            "Give a class, or its name: `automodel=transformers.AutoModelForMaskedLM`.",
        )
    return found if hasattr(found, "from_config") else _Exactly(found)


class _Exactly:
    """One model class with the two methods of an automatic one."""

    def __init__(self, model_class: Any) -> None:
        self._class = model_class
        self.from_pretrained = model_class.from_pretrained

    def from_config(self, config: Any, **options: Any) -> Any:
        """The model without weights."""
        wanted = self._class.config_class
        if wanted is not None and not isinstance(config, wanted):
            raise ValueError(f"`{self._class.__name__}` takes a `{wanted.__name__}`.")
        return self._class._from_config(config, **options)


def tokenizer_for(name: str, options: dict[str, Any]) -> Any:
    """The tokenizer that belongs to the model called `name`; `None` where it has none."""
    import transformers

    try:
        found = transformers.AutoTokenizer.from_pretrained(name, **_where(options))
    except (OSError, ValueError, KeyError, ImportError):
        return None
    return found if getattr(found, "vocab_size", 1) else None  # transformers 5 makes an empty one where there are no files


def processor_for(name: str, options: dict[str, Any]) -> Any:
    """The processor that belongs to the model called `name`: its tokenizer, and what makes tensors of images."""
    import transformers

    try:
        return transformers.AutoProcessor.from_pretrained(name, **_where(options))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise LoadError(
            f"The processor of `{name}` cannot be loaded: {first_line(error)}",
            "Make it of its parts, and give it: `VisionLanguageModel(name, processor=processor)`.",
        ) from error


def _where(options: dict[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in WHERE if key in options}


def _not_found(name: str, error: Exception) -> LoadError:
    return LoadError(
        f"`{name}` cannot be loaded: {first_line(error)}",
        "Give the folder of a saved model, or a model's name on the hub and a connection to it.",
    )


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
