"""The examples: what they compute beside plain hooks and autograd, the figures that they write, what they say of bad input."""

import sys

import pytest
import torch
from conftest import SIZES, train_tokenizer

from nnsight_eager import LanguageModel
from nnsight_eager.examples import activation_patching, attribution_patching, logit_lens, steering
from nnsight_eager.examples.indirect_objects import prompts

EXAMPLES = {
    "activation_patching": (activation_patching, ["--scenes", "1"]),
    "attribution_patching": (attribution_patching, ["--scenes", "1"]),
    "logit_lens": (logit_lens, ["--prompt", "When Mary and John went to the store"]),
    "steering": (steering, ["--layer", "1", "--tokens", "2", "--random", "1"]),
}
pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The folder of a tiny Llama whose tokenizer has the first scene's words."""
    import transformers

    path, tokenizer = tmp_path_factory.mktemp("words"), train_tokenizer(700)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=0, **SIZES["llama"]
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # the default initialisation makes every token equally likely
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def model(words):
    return LanguageModel(words, dispatch=True)


@pytest.fixture
def given(model):
    return prompts(model, 1)


def preference(model, given, texts, hook=None, module=None):
    """The preference for the right names by plain means."""
    handle = module.register_forward_hook(hook) if hook else None
    logits = model._module(**model.tokenizer(texts, return_tensors="pt")).logits[:, -1]
    if handle:
        handle.remove()
    return torch.stack([row[r] - row[w] for row, r, w in zip(logits, given.right, given.wrong, strict=True)]).mean()


def outputs(model, texts, modules):
    """What the modules give, by plain hooks, and the logits."""
    seen = {}

    def note(module, args, output):
        seen[module] = output if isinstance(output, torch.Tensor) else output[0]

    handles = [module.register_forward_hook(note) for module in modules]
    logits = model._module(**model.tokenizer(texts, return_tensors="pt")).logits
    for handle in handles:
        handle.remove()
    return [seen[module] for module in modules], logits


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_writes_its_figure(name, words, tmp_path, capsys):
    module, arguments = EXAMPLES[name]
    out = tmp_path / "figure.png"
    assert module.main(["--model", str(words), "--out", str(out), *arguments]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.endswith(f"The figure is in {out}.\n")


def test_the_prompts_differ_in_the_subject_alone(model, given):
    assert given.clean == [
        "When Mary and John went to the store, John gave a drink to",
        "When Mary and John went to the store, Mary gave a drink to",
    ]
    assert given.corrupt == given.clean[::-1]
    assert given.tokens[given.subject] == " John"
    assert given.tokens.index(" John") < given.subject  # the second mention
    assert [model.tokenizer.decode([token]) for token in given.right] == [" Mary", " John"]
    assert [model.tokenizer.decode([token]) for token in given.wrong] == [" John", " Mary"]


@pytest.mark.parametrize("part", attribution_patching.PARTS)
@torch.no_grad()
def test_a_patch_recovers_what_a_plain_hook_recovers(part, model, given):
    choose = attribution_patching.PARTS[part]
    found = activation_patching.recovered(model, given, choose)
    modules = [choose(layer) for layer in model._module.model.layers]
    clean, _ = outputs(model, given.clean, modules)
    best, worst = preference(model, given, given.clean), preference(model, given, given.corrupt)
    for layer, module in enumerate(modules):
        for position in range(len(given.tokens)):

            def patch(module, args, output, layer=layer, position=position):
                (output if isinstance(output, torch.Tensor) else output[0])[:, position] = clean[layer][:, position]

            expected = (preference(model, given, given.corrupt, patch, module) - worst) / (best - worst)
            torch.testing.assert_close(found[layer, position], expected, atol=1e-3, rtol=1e-3)


def test_the_last_layer_at_the_last_position_is_all_of_it(model, given):
    found = activation_patching.recovered(model, given)
    assert found[-1, -1].item() == pytest.approx(1, abs=1e-4)
    assert found[-1, given.subject : -1].tolist() == pytest.approx([0] * (len(given.tokens) - given.subject - 1), abs=1e-4)
    assert not found[:, : given.subject].any()


@pytest.mark.parametrize("part", attribution_patching.PARTS)
def test_an_estimate_is_that_of_plain_autograd(part, model, given):
    choose = attribution_patching.PARTS[part]
    found = attribution_patching.estimated(model, given, choose)
    modules = [choose(layer) for layer in model._module.model.layers]
    clean, _ = outputs(model, given.clean, modules)
    corrupt, logits = outputs(model, given.corrupt, modules)
    rows = torch.arange(len(logits))
    worst = (logits[rows, -1, given.right] - logits[rows, -1, given.wrong]).mean()
    gradients = torch.autograd.grad(worst, corrupt)
    best = preference(model, given, given.clean)
    expected = torch.stack(
        [torch.einsum("bsh,bsh->s", a - b, gradient) for a, b, gradient in zip(clean, corrupt, gradients, strict=True)]
    ) / (best - worst)
    torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_the_lens_answers_what_the_final_norm_and_output_matrix_do(model):
    prompt, module = "When Mary and John", model._module
    found = logit_lens.answers(model, prompt)
    hidden, logits = outputs(model, [prompt], list(module.model.layers))
    expected = torch.stack([module.lm_head(module.model.norm(each))[0] for each in hidden])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[-1], logits[0])


@torch.no_grad()
def test_the_steering_vector_and_its_effect_are_those_of_plain_hooks(model):
    layer = model._module.model.layers[1]
    means = []
    for sentences in (steering.FRIENDLY, steering.HOSTILE):
        alone = [outputs(model, [sentence], [layer])[0][0][0] for sentence in sentences]
        means.append(torch.cat(alone).mean(0))
    vector = steering.mean(model, 1, steering.FRIENDLY) - steering.mean(model, 1, steering.HOSTILE)
    torch.testing.assert_close(vector, means[0] - means[1], atol=1e-4, rtol=1e-3)

    good, bad = ([model.tokenizer(word).input_ids[0] for word in words] for words in (steering.GOOD, steering.BAD))
    handle = layer.register_forward_hook(lambda module, args, output: output + 2 * vector)
    last = [model._module(**model.tokenizer(prompt, return_tensors="pt")).logits[0, -1] for prompt in steering.PROMPTS]
    handle.remove()
    expected = sum((row[good].logsumexp(0) - row[bad].logsumexp(0)).item() for row in last) / len(last)
    assert steering.sentiment(model, 1, vector, 2) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "no/such-model"], "nnsight_eager: `no/such-model` cannot be loaded: "),
        (["--layer", "9"], "nnsight_eager: `--layer 9` does not exist: the model has 3 layers."),
        (["--layer", "-1"], "nnsight_eager: `--layer -1` does not exist: the model has 3 layers."),
        (["--tokens", "0"], "argument --tokens: `0` is not a number from 1 on"),
        (["--out", "no/such/folder/figure.png"], "argument --out: there is no folder `no/such/folder`"),
        (["--out", "figure.docx"], "argument --out: `figure.docx` does not end in .png, .svg or .pdf"),
    ],
)
def test_what_goes_wrong_is_a_sentence_and_a_status(words, tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    model = [] if "--model" in arguments else ["--model", str(words)]
    assert status(steering, [*model, *arguments]) != 0
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said


def test_a_figure_that_cannot_be_written_is_a_sentence(words, tmp_path, capsys):
    (tmp_path / "taken.png").mkdir()
    assert status(logit_lens, ["--model", str(words), "--prompt", "When Mary", "--out", str(tmp_path / "taken.png")]) == 1
    assert f"nnsight_eager: `{tmp_path / 'taken.png'}` cannot be written: Is a directory." in capsys.readouterr().err


def test_a_model_that_is_not_built_like_llama_is_a_sentence(folder, capsys):
    assert status(logit_lens, ["--model", str(folder("gpt2"))]) == 1
    assert "has no `model.layers`, `model.norm` and `lm_head`." in capsys.readouterr().err


def test_a_tokenizer_that_splits_the_names_is_a_sentence(folder, capsys):
    assert status(activation_patching, ["--model", str(folder("llama"))]) == 1
    assert "nnsight_eager: The model's tokenizer splits words of the prompts" in capsys.readouterr().err


def test_without_matplotlib_no_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert status(logit_lens, ["--model", "no/such-model"]) == 1
    assert capsys.readouterr().err == (
        "nnsight_eager: The figures need the package `matplotlib`.\nRun `pip install 'nnsight_eager[examples]'`.\n"
    )


def status(example, arguments):
    """The exit status, which argparse raises."""
    try:
        return example.main(arguments)
    except SystemExit as left:
        return left.code


@pytest.fixture
def deep(tmp_path, tokenizer):
    """The folder of a Llama of as many layers as the session names."""
    import transformers

    torch.manual_seed(0)
    sizes = {**SIZES["llama"], "num_hidden_layers": 22}
    config = transformers.AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "deep")
    tokenizer.save_pretrained(tmp_path / "deep")
    return tmp_path / "deep"


def test_the_session_is_drawn_with_what_a_shell_shows(deep, tmp_path, monkeypatch, capsys):
    from nnsight_eager.examples import stepping

    monkeypatch.setattr(stepping.demo, "folder", lambda: deep)
    hook = sys.displayhook
    assert stepping.main(["--out", str(tmp_path / "session.svg")]) == 0
    assert sys.displayhook is hook
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith(">>> ")] == [
        f">>> {line}" for line in stepping.SESSION.splitlines()
    ]
    model = LanguageModel(deep, dtype=torch.float32, dispatch=True)
    prompt = model.tokenizer("The Eiffel Tower is in the city of", return_tensors="pt")
    with torch.no_grad():
        clean = model._module(**prompt).logits[0, -1].argmax()
        handle = model._module.model.layers[21].mlp.register_forward_hook(lambda module, args, output: output * -4)
        edited = model._module(**prompt).logits[0, -1].argmax()
        handle.remove()
    assert repr((model.tokenizer.decode(clean), model.tokenizer.decode(edited))) in printed
    assert "paused at model.model.layers[6].input (LlamaDecoderLayer), step 0\n" in printed  # the first that is given the NaN
    svg = (tmp_path / "session.svg").read_text()
    assert svg.startswith("<svg")
    assert "@font-face" not in svg  # which would be fetched by whoever looks at it
    (tmp_path / "taken.svg").mkdir()
    assert stepping.main(["--out", str(tmp_path / "taken.svg")]) == 1
    assert f"`{tmp_path / 'taken.svg'}` cannot be written: Is a directory." in capsys.readouterr().err


def test_an_interrupted_example_ends_as_shells_expect_and_a_model_without_a_tokenizer_is_a_sentence(
    words, tmp_path, monkeypatch, capsys
):
    import shutil

    shutil.copytree(words, bare := tmp_path / "bare", ignore=shutil.ignore_patterns("token*"))
    assert status(logit_lens, ["--model", str(bare)]) == 1
    assert f"`{bare}` has no tokenizer.\nName a folder that a tokenizer was saved into as well." in capsys.readouterr().err

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(logit_lens, "answers", interrupted)
    assert status(logit_lens, ["--model", str(words), "--out", str(tmp_path / "figure.png")]) == 130
    assert not (tmp_path / "figure.png").exists()
