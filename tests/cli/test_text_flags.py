"""The flags about text through both commands: --bos, --text_column, chats; and what the launcher passes on."""

import copy
import json
import os
import shutil
import subprocess

import pytest
import torch
from conftest import ROOT, tiny_model
from test_commands import run
from transformers import AutoModelForCausalLM

import gradient_computation
from lib.data.sources import documents as documents_of
from lib.data.windows import calibration_windows, evaluation_tokens, windows_of

BOS, N, T = 1, 4, 16


@pytest.fixture(scope="module")
def gemma(tmp_path_factory, with_bos):
    folder = tmp_path_factory.mktemp("models") / "tiny-gemma"
    tiny_model("gemma2", noise=0).cpu().save_pretrained(folder)
    with_bos.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory, documents):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": document, "body": document[::-1]}) for document in documents))
    return path


@pytest.fixture
def flags(tmp_path, text):
    return ["--nsamples", N, "--seq_length", T, "--dtype", "float32", "--cache_dir", tmp_path / "cache", "--dataset", text]


def gradients(flags, model, folder):
    run("gradient_computation.py", *flags, "--model", model, "--output_dir", folder)
    (path,) = folder.glob(f"llama2/gradients_aggregrate_norm_l2_model_{model.name}")
    return path, json.loads((path / "index.json").read_text())


def dense_perplexity(flags, model, *more) -> str:
    command = [*flags, "--model", model, "--prune_method", "magnitude", "--sparsity_ratio", 0.1, "--force"]
    return next(line for line in run("main.py", *command, *more).splitlines() if line.startswith("dense")).split()[2]


@torch.no_grad()
def perplexity_of(model, windows) -> str:
    model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    losses = torch.stack([model(window[None], labels=window[None]).loss for window in windows]).double()
    return f"{losses.mean().exp():.4f}"


@pytest.mark.parametrize("bos", ["auto", "every", "first"])
def test_gemma_has_bos_before_every_window(gemma, flags, text, tmp_path, with_bos, documents, bos, monkeypatch, caplog):
    caplog.set_level("INFO")
    seen = []
    original = gradient_computation.read_calibration
    monkeypatch.setattr(gradient_computation, "read_calibration", lambda *given: (seen.append(original(*given)), seen[-1])[1])
    _, index = gradients([*flags, "--bos", bos], gemma, tmp_path)
    every = bos != "first"
    assert index["bos"] == ("every" if every else "first")
    expected = calibration_windows(documents, with_bos, N, T, 0, bos=BOS if every else None)
    assert torch.equal(seen[0], expected) and (expected[:, 0] == BOS).all() == every
    assert ("gemma2 models need BOS before every window" in caplog.text) == (bos == "auto")
    stream = evaluation_tokens(documents, with_bos, bos=BOS if every else None)
    found = dense_perplexity(flags, gemma, "--eval_dataset", text, "--bos", bos)
    assert float(found) == pytest.approx(float(perplexity_of(gemma, windows_of(stream, T, BOS if every else None))), rel=1e-4)


def test_llama_has_bos_where_the_tokenizer_puts_it(saved_model, flags, tmp_path, text):
    assert gradients(flags, saved_model, tmp_path)[1]["bos"] == "first"
    found = {
        bos: dense_perplexity(flags, saved_model, "--eval_dataset", text, "--bos", bos) for bos in ("auto", "first", "every")
    }
    assert found["auto"] == found["first"] != found["every"]


def test_no_bos_token_to_put_there(gemma, tokenizer, flags, tmp_path):
    """As of models that have none, such as Qwen's."""
    without = copy.deepcopy(tokenizer)
    without.bos_token = None
    model = tmp_path / "model"
    tiny_model("olmo2", noise=0).cpu().save_pretrained(model)
    without.save_pretrained(model)
    assert gradients(flags, model, tmp_path / "gradients")[1]["bos"] == "first"
    with pytest.raises(ValueError, match="olmo2 model has no BOS token .*--bos first"):
        gradients([*flags, "--bos", "every"], model, tmp_path / "gradients")


def test_gradients_of_other_text_are_pointed_out(saved_model, flags, text, tmp_path, caplog):
    path, index = gradients([*flags, "--text_column", "text"], saved_model, tmp_path)
    assert index["text_column"] == "text"
    command = [*flags, "--model", saved_model, "--eval_dataset", text, "--sparsity_ratio", 0.1, "--force"]
    command += ["--prune_method", "gblm", "--gradient_path", path]
    run("main.py", *command, "--text_column", "text")
    assert "the gradients were computed" not in caplog.text
    run("main.py", *command, "--bos", "every")
    assert "the gradients were computed with --bos first, the activations will be with every" in caplog.text
    assert "the gradients were computed with --text_column text, the activations will be with None" in caplog.text
    caplog.clear()
    for flag in ("bos", "text_column"):  # as before these flags were there
        index.pop(flag)
    (path / "index.json").write_text(json.dumps(index))
    run("main.py", *command)
    assert "the gradients were computed" not in caplog.text
    run("main.py", *command, "--bos", "every")
    assert "the gradients were computed with --bos first, the activations will be with every" in caplog.text


def test_a_column_and_chats_and_folders(saved_model, tokenizer, documents, flags, tmp_path):
    """The same text as a column of another name, as a folder of files, and written by a template: the same numbers."""
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    model = tmp_path / "model"
    shutil.copytree(saved_model, model)
    chatty.save_pretrained(model)
    rows = {
        "plain.jsonl": ({"text": document} for document in documents),
        "column.jsonl": ({"body": document, "text": None} for document in documents),
        "chats.jsonl": ({"messages": [{"role": "user", "content": document}]} for document in documents),
        "folder/b.jsonl": ({"text": document} for document in documents[25:]),
        "folder/a.json": ({"text": document} for document in documents[:25]),
    }
    (tmp_path / "folder").mkdir()
    for name, content in rows.items():
        (tmp_path / name).write_text("\n".join(map(json.dumps, content)))
    found = {}
    for name, more in {
        "plain.jsonl": [],
        "column.jsonl": ["--text_column", "body"],
        "chats.jsonl": [],
        "folder": [],
        "folder/*": [],
    }.items():
        command = [*flags, "--model", model, "--dataset", tmp_path / name, "--eval_dataset", tmp_path / name, *more]
        printed = run("main.py", *command, "--prune_method", "wanda", "--sparsity_ratio", 0.5, "--force")
        found[name] = [line.partition(" on ")[0] for line in printed.splitlines()[1:]]
    assert all(lines == found["plain.jsonl"] for lines in found.values()), found
    assert list(documents_of(str(tmp_path / "folder"), cache_dir=str(tmp_path / "cache"))) == documents


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_perplexity_that_is_no_number_names_the_dtype_first(saved_model, flags, text, tmp_path, dtype):
    model = AutoModelForCausalLM.from_pretrained(saved_model)
    with torch.no_grad():
        mlp = model.model.layers[1].mlp
        for linear in (mlp.gate_proj, mlp.up_proj):  # weights that float16 can hold, and a product that it cannot
            linear.weight *= 300
        if dtype == "float32":
            mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    for file in saved_model.glob("tokenizer*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    command = [*flags, "--model", tmp_path / "model", "--dtype", dtype, "--eval_dataset", text, "--sparsity_ratio", 0.1]
    command += ["--prune_method", "magnitude"]
    with pytest.raises(
        ValueError, match=f"dense perplexity is (nan|inf) .* computed in {dtype}, .*tokenizer.*--force"
    ) as error:
        run("main.py", *command)
    remedy = (
        "beyond 65504 overflow: use --dtype bfloat16 or float32" if dtype == "float16" else "weights may be NaN or infinite"
    )
    assert str(error.value).index(remedy) < str(error.value).index("may not be this model's tokenizer")
    if dtype == "float16":
        assert "pruned perplexity" in run("main.py", *command, "--force")


def test_the_launcher_passes_on_what_both_commands_share(tmp_path):
    """With a `python` that only tells how it was called."""
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    (tmp_path / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "VIRTUAL_ENV": "one"}
    shared = ["--dataset", "texts", "--text_column", "body", "--bos", "every", "--pack"]
    command = ["bash", "run_gblm_prune.sh", "--model", "no/such", *shared, "--force"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    compute, prune = (tmp_path / "calls").read_text().splitlines()
    assert compute.startswith("gradient_computation.py --model no/such") and prune.startswith("main.py --model no/such")
    assert " ".join(shared) in compute and " ".join(shared) in prune
    assert "--force" in prune and "--force" not in compute
