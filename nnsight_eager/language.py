"""`LanguageModel`: load, tokenize, pad, generate.

model = LanguageModel("openai-community/gpt2", device_map="auto")
with model.generate("The Eiffel Tower is in the city of", max_new_tokens=3) as tracer:
    for step in tracer.iter[:]:
        print(model.lm_head.output[0, -1].argmax())
model.tokenizer.decode(tracer.result[0])
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .activations import Activations
from .aliases import Rename
from .batching import Given, joined, with_shared
from .dataset import Row, refuse_longer, token_rows
from .errors import ExtractError, InputError, LoadError
from .extraction import Extraction, Options, Share
from .inputs import Inputs, for_tokenizer
from .invokes import Division
from .loading import Source, source, tokenizer_for
from .model import NNsight
from .padding import CONTENT, Side, positions, together
from .run import Call
from .scan import Scan
from .signatures import keywords_of
from .trace import Trace
from .tree import Tree


class Generator:
    """The generation as a whole: `model.generator.output` is what it returns, ids `[batch, seq]`."""

    __slots__ = ("_tree",)

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    @property
    def output(self) -> torch.Tensor:
        """The generated ids; the rest of the generation runs first."""
        return self._tree.run().result  # type: ignore[no-any-return]

    @output.setter
    def output(self, value: Any) -> None:
        self._tree.run().result = value

    def __repr__(self) -> str:
        return "model.generator: its `output` is what `model.generate(...)` returns"


class Generation(Trace):
    """A trace of a generation. It has no graph, so where its code asks autograd for a gradient, torch's error says why."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            _say_no_graph(error)
            return super().__exit__(kind, error, traceback)
        except RuntimeError as raised:  # by the block of an invoke
            _say_no_graph(raised)
            raise


def _say_no_graph(error: BaseException | None) -> None:
    if isinstance(error, RuntimeError) and re.search("requires?[ _]grad", str(error)):
        error.add_note("Transformers' `generate` runs under `torch.no_grad()`: use `model.trace` for gradients.")


class LanguageModel(NNsight):
    """A transformers language model: `trace` runs one forward pass on a prompt, `generate` a generation."""

    tokenizer: Any = None
    """The tokenizer, or `None`, which only matters when text is passed."""

    def __init__(
        self,
        name_or_path_or_module: str | PathLike[str] | torch.nn.Module,
        tokenizer: Any = None,
        device_map: Any = None,
        dtype: Any = None,
        dispatch: bool = False,
        attn_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        rename: Rename | None = None,
        automodel: Any = None,
        **from_pretrained: Any,
    ) -> None:
        """Wrap a loaded module, or a model by its name or folder, whose weights are loaded at the first run.

            model = LanguageModel("openai-community/gpt2")
            model = LanguageModel(hf_model, tokenizer=hf_tokenizer)
            model = LanguageModel("google-bert/bert-base-uncased", automodel=AutoModelForMaskedLM)

        `automodel` is any model class of transformers, automatic or not, or its name; without it the class is the one that the
        model was saved as. `dispatch=True` loads the weights at once; `rename` gives modules other names, as for `NNsight`.
        What else is given goes to `from_pretrained`. Raises `LoadError` where there is no such model, or it is none of that
        class.
        """
        named = {"device_map": device_map, "dtype": dtype, "attn_implementation": attn_implementation, "revision": revision}
        options = {name: value for name, value in named.items() if value is not None} | from_pretrained
        if trust_remote_code:
            options["trust_remote_code"] = True
        self._source: Source | None = None  # until it is loaded
        self._origin: Source | None = None  # what it was loaded from, and is still the same as
        if isinstance(name_or_path_or_module, (str, PathLike)):
            name = fspath(name_or_path_or_module)
            self._source = source(name, options, automodel)
            tokenizer = name if tokenizer is None else tokenizer
            super().__init__(self._source.skeleton(), rename)
        else:
            super().__init__(name_or_path_or_module, rename)
        self.tokenizer = tokenizer_for(tokenizer, options) if isinstance(tokenizer, str) else tokenizer
        if dispatch:
            self.dispatch()

    @property
    def generator(self) -> Generator:
        """The generation as a whole: `model.generator.output` is what it returns."""
        return Generator(self._tree)

    def dispatch(self) -> "LanguageModel":
        """Load the weights, if that has not been done, and give the model."""
        if self._source is not None:
            self._point_at(self._source.load())
            self._origin, self._source = self._source, None
        return self

    def load_adapter(self, name_or_path: str | PathLike[str], adapter_name: str | None = None, **options: Any) -> None:
        """Add a PEFT adapter (LoRA and its like) to the model, and have it take part in what runs from here on.

            model.load_adapter("adapter-folder")
            model.transformer.h[0].attn.c_attn.output           # with the adapter; paths stay as they are
            model.disable_adapters()                            # transformers' own methods, on the module

        Options are those of transformers' `load_adapter`. Raises `LoadError` where `peft` is not installed or there is no such
        adapter.
        """
        self.dispatch()
        try:
            self._module.load_adapter(fspath(name_or_path), adapter_name=adapter_name, **options)  # type: ignore[operator]
        except (ImportError, OSError, ValueError) as error:
            raise LoadError(
                f"The adapter `{fspath(name_or_path)}` cannot be loaded: {str(error).strip().splitlines()[0]}",
                "Give a folder that `save_pretrained` of a PEFT model has written; adapters need `pip install peft`.",
            ) from error
        self._tree.memory.orders.clear()  # other modules run now
        self._origin = None

    def trace(
        self,
        *inputs: Any,
        fn: str | Callable[..., Any] | None = None,
        batched: bool = True,
        keep: bool = False,
        **keywords: Any,
    ) -> Trace:
        """Run one forward pass with its insides open.

            with model.trace("The Eiffel Tower is in the city of"):
                hidden = model.transformer.h[5].output        # [batch, seq, hidden]
                logits = model.lm_head.output                 # [batch, seq, vocabulary]

        The input is text, a list of texts, ids (a list, nested lists, a tensor), an encoding or dict, chat messages, or one of
        the keywords `input_ids=`, `inputs_embeds=`, or what else the model runs on (`input_features=` of speech models).
        `truncation=`, `max_length=` beside it, and `add_special_tokens=` go to the tokenizer, other keywords to the call.
        Shorter rows are padded, left for a causal model, with their positions counted from the first real token. With `fn`,
        what is given goes to that method as it is.
        """
        self.dispatch()
        if fn is not None and fn != "forward":
            return super().trace(*inputs, fn=fn, batched=batched, keep=keep, **keywords)
        trace = self._traced("forward", inputs, keywords, batched)
        return self._kept(trace) if keep else trace

    def generate(self, *inputs: Any, batched: bool = True, **keywords: Any) -> Trace:
        """Generate with the insides of every step open; `generate(...).result` simply generates, ids `[batch, seq]`.

            with model.generate("The Eiffel Tower is in the city of", max_new_tokens=10) as tracer:
                for step in tracer.iter[:]:
                    model.transformer.h[5].output *= 0.9
            model.tokenizer.decode(tracer.result[0])

        Inputs are those of `trace`; keywords go to transformers' `generate`.
        """
        self.dispatch()
        if not self._generates:
            name = type(self._module).__name__
            raise InputError(f"`{name}` does not generate.", "Use `model.trace(...)`, or load a model with a language head.")
        return self._traced("generate", inputs, keywords, batched)

    def extract(
        self,
        texts: Any,
        points: Any,
        out: str | PathLike[str],
        *,
        batch_tokens: int = 8192,
        dtype: torch.dtype | None = None,
        column: str | None = None,
        max_length: int | None = None,
        shard_bytes: int = 2**28,
        workers: int | None = None,
    ) -> Activations:
        """Run the model on a data set and keep the activations of all its tokens in a folder.

            activations = model.extract(texts, ["transformer.h.*"], "folder", dtype=torch.float16)
            activations[7]["transformer.h.5"]               # text 7: [seq, hidden], memory-mapped
            for shard in activations.shards():              # all tokens, to train on
                shard["transformer.h.5"], shard.rows        # [tokens, hidden], [tokens]

        `texts` are texts, lists of token ids, or dicts that have one of them as `text`, `input_ids` or the `column` named, as
        the rows of a `datasets.Dataset` do. `points` are envoys or paths, `*` standing for any one name; stored is the first
        tensor of a module's output, `[batch, seq, ...]`. Texts of like length are padded to batches of at most `batch_tokens`,
        and the padding is not stored. The forward pass is stopped behind the last point.

        With `workers` so many Ray workers make the shards, on this machine or on the cluster that this process is in, where all
        have to see the folder; they load the model themselves where it was loaded by name. The folder is the same to the bit.
        A model that is divided among ranks is run by all of them, and rank 0 writes the folder, which all read.

        Called again as it was after it was killed, it goes on, and the folder becomes the same to the bit; a folder that is
        finished is read. That the weights are the same is told by a few values of each. Texts longer than the model has
        positions are refused, or cut with `max_length`. Raises `InputError` for what is no text, `PathError` for an unknown
        path, `ExtractError` for a point that has no value for each token and for a folder that another request has written.
        """
        rows = token_rows(texts, self.tokenizer, column, max_length)
        self.dispatch()
        between = self._tree.memory.look_between(self._module, "extract")
        if between is not None and workers is not None:
            raise ExtractError("Each of `workers` loads a whole model, and this one is divided.", "Leave `workers` away.")
        refuse_longer(rows, getattr(getattr(self._module, "config", None), "max_position_embeddings", None))
        modules = self._chosen(() if points is None else points)
        options = Options(batch_tokens, dtype, shard_bytes)
        extraction = Extraction(self, self._without_cache, modules, rows, options)
        if between is not None:
            between.write(extraction, Path(out))
        else:
            extraction.write(Path(out), None if workers is None else self._shared(extraction, workers))
        return Activations(out)

    def _shared(self, extraction: Extraction, workers: int) -> Share:
        """What has Ray workers make shards."""
        if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
            raise ExtractError(f"`workers` was given {workers!r}.", "Give a whole number of at least 1.")
        from .remote.workers import share

        return partial(share, extraction, self._origin, count=workers)

    def _without_cache(self, rows: list[Row]) -> dict[str, Any]:
        """The keywords of a forward pass on rows of ids, which nothing goes on from."""
        # Ids may be given without a tokenizer; the mask hides whatever pads them.
        inputs = self._inputs._replace(pad=self._pad or 0)
        return inputs.prepare((rows,), {"use_cache": False} if "use_cache" in self._takes else {})

    def _view(self) -> NNsight:
        self.dispatch()  # the view has the same weights, so they are loaded for both
        return super()._view()

    def scan(self, *inputs: Any, **keywords: Any) -> Scan:
        """The forward pass on fake tensors: shapes, types and devices, no values. Weights are not loaded for it.

        with model.scan("The Eiffel Tower is in"):
            print(model.transformer.h[5].hidden.shape)       # [1, seq, hidden]
        """
        call = self._called("forward", self._prepare(inputs, keywords))
        mask = call.kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and bool(mask.all()):
            del call.kwargs["attention_mask"]  # the model would drop it too, but cannot see that it is all ones
        return Scan(self._tree, call)

    def batch(self, inputs: Sequence[Given]) -> tuple[Given, list[int]]:
        """How the inputs of several invokes become one call: padded to one length, with a mask and positions to match.

        Raises `BatchError` for a keyword that has no rows (give it to `trace`), and for ids beside embeddings.
        """
        prepare = self._prepare
        if all(len(each.args) == 1 and isinstance(each.args[0], str) and not each.kwargs for each in inputs):
            return Given((), prepare(([each.args[0] for each in inputs],), {})), [1] * len(inputs)  # tokenized at once
        each_prepared = [prepare(each.args, each.kwargs) for each in inputs]
        if not any(content in each for each in each_prepared for content in CONTENT):
            return joined([Given((), each) for each in each_prepared])  # no tokens to pad: images, sounds
        prepared, sizes = together(each_prepared, self._side, self._pad)
        return Given((), prepared), sizes

    def _new_trace(self, name: str, call: Call | None, division: Division | None) -> Trace:
        return (Generation if name == "generate" else Trace)(self._tree, name, call, division)

    def _traced(self, name: str, inputs: tuple[Any, ...], keywords: dict[str, Any], batched: bool) -> Trace:
        """A trace of one call; where nothing says what to run on, that is left to invokes."""
        if inputs or any(keywords.get(content) is not None for content in self._content):
            return self._new_trace(name, self._called(name, self._prepare(inputs, keywords)), None)

        def together(given: Sequence[Given]) -> tuple[Call, list[int]]:
            tokenizing, others = for_tokenizer(keywords)
            batch, sizes = self.batch([Given(each.args, {**tokenizing, **each.kwargs}) for each in given])
            return self._called(name, with_shared(batch, others).kwargs), sizes

        return self._new_trace(name, None, Division(together, batched))

    def _prepare(self, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Any]:
        """What a user has passed, as the keywords of a call."""
        return self._inputs.prepare(inputs, keywords)

    def _called(self, name: str, prepared: dict[str, Any]) -> Call:
        """The call of `forward` or `generate` on inputs that are prepared."""
        prepared = self._on_device(prepared)
        if name == "forward":
            return Call(name, self._module, (), self._positioned(prepared))
        configured = getattr(getattr(self._module, "generation_config", None), "pad_token_id", None)
        if configured is None and "generation_config" not in prepared and self._pad is not None:
            prepared.setdefault("pad_token_id", self._pad)  # transformers would take the same id, with a warning
        return Call(name, self._module.generate, (), prepared)  # type: ignore[arg-type]

    @property
    def _side(self) -> Side:
        """Causal models are padded on the left, so that the last token is the last column; encoders on the right."""
        return "left" if self._generates and not self._encodes else "right"

    @property
    def _generates(self) -> bool:
        can_generate = getattr(self._module, "can_generate", None)
        return can_generate is not None and bool(can_generate())

    @property
    def _takes(self) -> frozenset[str]:
        """The keywords of the model's forward."""
        return keywords_of(self._module.forward)

    @property
    def _encodes(self) -> bool:
        return bool(getattr(getattr(self._module, "config", None), "is_encoder_decoder", False))

    @property
    def _places_images(self) -> bool:
        """Whether the model counts its positions itself: a token of an image has three (Qwen2-VL's `get_rope_index`)."""
        return any(hasattr(each, "get_rope_index") for each in (self._module, getattr(self._module, "model", None)))

    @property
    def _pad(self) -> int | None:
        """The id to pad with: any will do, since the mask hides it."""
        for name in ("pad_token_id", "eos_token_id"):
            found = getattr(self.tokenizer, name, None)
            if isinstance(found, int):
                return found
        return None

    @property
    def _inputs(self) -> Inputs:
        """How this model wants its inputs."""
        return Inputs(self.tokenizer, self._side, self._pad, self._takes, self._content[-1])

    @property
    def _content(self) -> tuple[str, ...]:
        """The keywords that hold what the model is run on, tokens or whatever else it takes."""
        return *CONTENT, str(getattr(self._module, "main_input_name", CONTENT[0]))

    def _on_device(self, prepared: dict[str, Any]) -> dict[str, Any]:
        """The keywords of the call, on the model's device."""
        device = getattr(self._module, "device", None)
        if not isinstance(device, torch.device) or device.type == "meta":  # offloaded: accelerate moves what it is given
            return prepared
        return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in prepared.items()}

    def _positioned(self, prepared: dict[str, Any]) -> dict[str, Any]:
        """What a forward pass needs beside its input: the positions of a left-padded batch, a first decoder token."""
        mask, config = prepared.get("attention_mask"), getattr(self._module, "config", None)
        content = next((prepared[name] for name in self._content if prepared.get(name) is not None), None)
        counts = self._side == "left" and "position_ids" in self._takes and prepared.get("past_key_values") is None
        counts = counts and not self._places_images
        if counts and isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool(mask.all()):
            prepared.setdefault("position_ids", positions(mask))
        given = any(prepared.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels"))
        start = getattr(config, "decoder_start_token_id", None)
        if self._encodes and not given and content is not None and start is not None:
            prepared["decoder_input_ids"] = torch.full((len(content), 1), start, device=content.device)
        return prepared
