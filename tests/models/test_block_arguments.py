"""What is a sample's own among its blocks' arguments: what samples share, what is counted, what is kept in files."""

import json

import pytest
import torch
from conftest import DEVICE, SMALL, prune_model, random_windows, tiny_decoder
from test_carried import decoder_of, model_of
from test_commands import run
from torch.utils._pytree import tree_leaves

from lib.models import block_arguments, memory
from lib.models.decoder import Decoder, State
from lib.pruning.masks import Sparsity

BLOCKS, WIDTH, PER_LAYER = 6, SMALL["hidden_size"], 8  # of test_carried's models
STREAMS = {"gemma3n": 4, "gemma4": 1}  # hidden states that a sample has


def test_what_is_equal_is_shared_and_nothing_else():
    mask, table = torch.ones(3, 3), (torch.ones(3), torch.zeros(3))
    old = [{"mask": mask, "table": table, "own": torch.ones(2), "n": 1}]
    new = [{"mask": mask.clone(), "table": tuple(part.clone() for part in table), "own": torch.zeros(2), "n": 1}]
    found = block_arguments.shared(new, old)
    assert found[0]["mask"] is mask and all(a is b for a, b in zip(found[0]["table"], table, strict=True))
    assert found[0]["own"] is new[0]["own"] and block_arguments.unshared(found, old) == [new[0]["own"]]
    assert block_arguments.shared([dict(old[0])], old) is old
    for other in ([], [{"mask": mask}], [old[0], old[0]]):
        assert block_arguments.shared(new, other) is new


def test_tensors_inside_others_go_to_files_too():
    shared = torch.ones(2)
    own = [{"a": {"b": (shared, torch.arange(3))}, "n": None}, {"a": torch.zeros(2, 2).T}]
    kept = block_arguments.in_file(own, [{"a": shared}])
    assert kept[0]["a"]["b"][0] is shared and kept[0]["n"] is None
    for tensor, before in ((kept[0]["a"]["b"][1], own[0]["a"]["b"][1]), (kept[1]["a"], own[1]["a"])):
        assert tensor.is_shared() and torch.equal(tensor, before)  # with a file


@pytest.mark.parametrize("kind", STREAMS)
def test_a_plan_counts_what_a_sample_keeps(kind):
    decoder, streams = decoder_of(kind), STREAMS[kind]
    assert decoder.hidden_bytes == streams * WIDTH * 4
    assert decoder.own_bytes == BLOCKS * PER_LAYER * 4
    plan = memory.Plan(True, 100).measured(decoder)
    assert plan.samples == 100 * WIDTH // (streams * WIDTH + BLOCKS * PER_LAYER)
    assert plan.group(50, 10) * (10 * streams * WIDTH + BLOCKS * PER_LAYER) <= 100 * WIDTH


@pytest.mark.parametrize("family", ["llama-gqa-tied", "gemma2", "opt", "falcon"])
def test_where_samples_share_all_arguments_the_plan_stays(family):
    decoder = tiny_decoder(family)
    assert (decoder.hidden_bytes, decoder.own_bytes) == (WIDTH * 4, 0)
    plan = memory.Plan(True, 100)
    assert plan.measured(decoder) is plan and plan.samples == 100


def in_a_file(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_shared()


def in_memory(states: list[State]) -> int:
    """Bytes of hidden states and arguments that are not in files, each tensor once."""
    tensors = {}
    for state in states:
        for value in tree_leaves([state.hidden, *state.kwargs]):
            if isinstance(value, torch.Tensor) and not in_a_file(value):
                tensors[id(value)] = value
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("kind", STREAMS)
def test_beyond_the_plan_it_is_in_files_with_the_same_result(kind):
    windows, found = random_windows(4), []
    for kept in (None, 2):
        decoder = Decoder(model_of(kind), DEVICE)
        states = decoder.enter_all(windows, in_memory=kept)
        sample = windows.shape[1] * (decoder.hidden_bytes + decoder.own_bytes)
        shared = in_memory([states[-1]]) - sample * (kept is None)
        assert in_memory(states) - shared <= (sample if kept else len(windows) * sample)  # of the first one, masks as well
        assert all(in_a_file(state.hidden) == bool(kept) for state in states)
        prune_model(decoder, windows, method="wanda", sparsity=Sparsity.parse("2:4"), hidden_states=kept)
        found.append(decoder.model.state_dict())
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())


@pytest.mark.parametrize("memory", ["resident", "streamed"])
def test_both_commands_give_the_same_with_little_memory_for_states(memory, tokenizer, documents, tmp_path, monkeypatch):
    model, text = tmp_path / "gemma3n", tmp_path / "text.jsonl"
    model_of("gemma3n").cpu().save_pretrained(model)
    tokenizer.save_pretrained(model)
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    entered, enter_all = [], Decoder.enter_all

    def note(decoder, windows, kept):
        entered.append((kept, enter_all(decoder, windows, kept)))
        return entered[-1][1]

    monkeypatch.setattr(Decoder, "enter_all", note)
    sample = 16 * 4 * (4 * WIDTH + BLOCKS * PER_LAYER)
    results = []
    for name, budget in (("much", 1), ("little", 3 * sample / 1e9)):
        flags = [
            "--model", model, "--dataset", text, "--nsamples", 5, "--seq_length", 16, "--dtype", "float32", "--bos", "first",
            "--cache_dir", tmp_path / "cache", "--memory", memory, "--activation_memory", budget,
        ]  # fmt: skip
        out = tmp_path / name
        run("gradient_computation.py", *flags, "--output_dir", out)
        gradients = out / "llama2" / "gradients_aggregrate_norm_l2_model_gemma3n"
        run(
            "main.py", *flags, "--prune_method", "gblm", "--sparsity_type", "2:4", "--eval_dataset", text, "--no_cache", "--force",
            "--gradient_path", gradients, "--save", out, "--save_model", out / "pruned",
        )  # fmt: skip
        files = [*gradients.glob("*.safetensors"), out / "pruned" / "model.safetensors", out / "log.txt"]
        results.append({path.relative_to(out): path.read_bytes() for path in files})
    assert results[0] == results[1] and len(results[0]) == BLOCKS + 2
    assert 0 < entered[1][0] <= 3
    assert not any(in_a_file(state.hidden) for state in entered[0][1]) and all(
        in_a_file(state.hidden) for state in entered[1][1]
    )
