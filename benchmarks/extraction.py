"""How fast are the activations of a data set written to disk? Every layer's residual stream, for each token.

python benchmarks/extraction.py [--quick]

The baseline is a loop over the same batches with plain hooks, which keeps the tokens that are no padding and writes one
safetensors file. nnsight's row is the usual recipe: a trace for each batch, and the same file.
"""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from models import gpt2, word_tokenizer
from question import PEER, Asked, Case, answer
from safetensors.torch import save_file
from timing import Ways

from nnsight_eager import LanguageModel
from nnsight_eager.dataset import batched

if PEER == "nnsight":
    import nnsight

BATCH_TOKENS = 512


def cases(asked: Asked) -> Iterator[Case]:
    """What is measured."""
    model = gpt2(64 if asked.quick else 768, 6, 1000)
    texts = (6,) if asked.quick else (32, 128)
    for count in texts:
        lengths = [8 + 7 * number % 57 for number in range(count)]
        rows = [[(number + position) % 1000 for position in range(length)] for number, length in enumerate(lengths)]
        title = f"{sum(lengths)} tokens to disk, 6 layers of GPT-2, {model.config.n_embd} wide"
        yield Case(title, ways(model, rows), asked.rounds(400 // count), twice=False, clock=time.perf_counter)


def ways(model: Any, rows: list[list[int]]) -> Ways:
    """The ways to write a data set's activations; each into a new folder."""
    layers = list(model.transformer.h)
    batches = [[rows[number] for number in batch] for batch in batched([len(row) for row in rows], BATCH_TOKENS)]

    def hooked() -> None:
        chunks: list[list[torch.Tensor]] = [[] for _ in layers]
        mask = torch.tensor(0)
        handles = [
            layer.register_forward_hook(lambda module, args, output, chunk=chunk: chunk.append(output[mask]))
            for layer, chunk in zip(layers, chunks, strict=True)
        ]
        for batch in batches:
            inputs = padded(batch)
            mask = inputs["attention_mask"].bool()
            model.transformer(**inputs, use_cache=False)
        for handle in handles:
            handle.remove()
        written(chunks, rows)

    if PEER:
        peer = nnsight.LanguageModel(model, tokenizer=word_tokenizer(["word"]))
        envoys = list(peer.transformer.h)

        def theirs() -> None:
            chunks: list[list[torch.Tensor]] = [[] for _ in layers]
            for batch in batches:
                inputs = padded(batch)
                with peer.trace(**inputs, use_cache=False):
                    seen = nnsight.save([])
                    for envoy in envoys:
                        seen.append(envoy.output)
                for chunk, hidden in zip(chunks, seen, strict=True):
                    chunk.append(hidden[inputs["attention_mask"].bool()])
            written(chunks, rows)

        return {"plain hooks": hooked, "nnsight": theirs}
    twin = LanguageModel(model)

    def ours() -> None:
        folder = Path(mkdtemp())
        twin.extract(rows, ["transformer.h.*"], folder, batch_tokens=BATCH_TOKENS)
        shutil.rmtree(folder)

    return {"plain hooks": hooked, "nnsight_eager": ours}


def padded(batch: list[list[int]]) -> dict[str, torch.Tensor]:
    """A batch's keywords, padded on the left."""
    longest = max(map(len, batch))
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch])
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in batch])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def written(chunks: list[list[torch.Tensor]], rows: list[list[int]]) -> None:
    """One file of everything, as a loop like this writes it."""
    folder = Path(mkdtemp())
    tensors = {f"transformer.h.{number}": torch.cat(chunk) for number, chunk in enumerate(chunks)}
    save_file(tensors | {"token": torch.tensor([token for row in rows for token in row])}, folder / "activations.safetensors")
    shutil.rmtree(folder)


if __name__ == "__main__":
    answer(__doc__, cases, apart=("nnsight",))
