"""Both commands on a device that is not the CPU: nothing is mixed, little crosses the bus, and the results are the CPU's."""

import json

import conftest
import pytest
import torch
from conftest import TINY, prune_model, random_windows, tiny_model
from test_commands import run
from torch.distributed.distributed_c10d import Backend, BackendConfig
from transformers import AutoModelForCausalLM

from lib import parallel
from lib.gradients.folder import GradientNorms
from lib.gradients.walk import gradient_norms
from lib.models import fingerprint, loading
from lib.models.decoder import Decoder
from lib.pruning.masks import Sparsity
from lib.pruning.methods import METHODS
from lib.pruning.updates.recipe import RECIPES, Recipe

if conftest.DEVICE.type == "cuda":
    pytest.skip("the stand-in is for machines without a GPU", allow_module_level=True)
from accelerator import DEVICE, counted, install, same_kernels  # it registers a device with torch

CPU = torch.device("cpu")
N = 3  # samples
BLOCKS, LINEARS = 3, 7


@pytest.fixture(autouse=True)
def kernels():
    with same_kernels():
        yield


def on(device, family: str = "llama-gqa-tied", dtype=torch.float32) -> Decoder:
    return Decoder(tiny_model(family, dtype).cpu().to(device), device)


def windows_on_host() -> torch.Tensor:
    return random_windows(N).cpu()


def norms_of(decoder, **options):
    return {
        (i, norm, name): total.cpu()
        for i, sums in gradient_norms(decoder, windows_on_host(), **options)
        for norm in ("l1", "l2")
        for name, total in sums.result(norm).items()
    }


def gradients_of(decoder):
    def block(i):
        generator = torch.Generator().manual_seed(i)
        return {name: torch.rand(shape, generator=generator).half() for name, shape in decoder.shapes(i).items()}

    return block


def test_the_stand_in_refuses_what_a_gpu_refuses_and_counts_what_it_waits_for():
    there, here = torch.arange(6.0).to(DEVICE), torch.arange(6.0)
    with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
        there + here
    with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
        torch.stack([here, there])
    with pytest.raises(TypeError):
        there.numpy()
    for expected, action in {
        (0, 0, 0): lambda: (there + torch.tensor(2.0)).mul_(3).sort().values.kthvalue(2),  # scalars travel with the kernel
        (1, 0, 1): lambda: here.to(DEVICE),
        (1, 0, 0): lambda: here.to(DEVICE, non_blocking=True),
        (0, 1, 1): lambda: there.tolist(),
        (0, 0, 1): lambda: there.sum().item(),
        (0, 0, 2): lambda: (bool(there.isfinite().all()), float(there[1])),
        (0, 0, 3): lambda: (there[there > 2], torch.equal(there, there), there.nonzero()),
        (1, 0, 2): lambda: (there[torch.tensor([1, 2])], torch.cholesky_inverse(torch.eye(2, device=DEVICE))),
        (0, 1, 2): lambda: (here.copy_(there, non_blocking=True), there.isnan().any().item()),
    }.items():
        with counted() as traffic:
            action()
        assert (traffic["uploads"], traffic["downloads"], traffic["waits"]) == expected
    assert torch.equal((there * 2).cpu(), here * 2)


@pytest.mark.parametrize("family", TINY)
def test_every_family_walks_on_a_device(family):
    expected, found = norms_of(on(CPU, family)), norms_of(on(DEVICE, family))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


# Per sample: the head and (T <= 512) the tail are asked once each by transformers, whether the positions are packed, and the
# arguments of two samples are compared. In float16 the loss scale has to be known before a sample's gradient goes on.
HEAD = 2 * N - 1
WALKS = {
    ("float32", True): N * (2 + 1) - 1 + N,
    ("bfloat16", True): N * (2 + 1) - 1 + N,
    ("float16", True): N * (2 + 1) - 1 + N * (2 + BLOCKS),
    ("float32", False): N * (2 + 1) - 1 + BLOCKS,
    ("bfloat16", False): N * (2 + 1) - 1 + BLOCKS,
    ("float16", False): N * (2 + 1) - 1 + N * (2 + BLOCKS),
}


@pytest.mark.parametrize("dtype, keep_graph", WALKS)
def test_gradients_are_the_cpus_and_wait_for_the_device_once_a_sample_or_a_block(dtype, keep_graph):
    here, there = (on(device, dtype=getattr(torch, dtype)) for device in (CPU, DEVICE))
    expected = norms_of(here, keep_graph=keep_graph)
    with counted() as traffic:
        sums = [sums for _, sums in gradient_norms(there, windows_on_host(), keep_graph=keep_graph)]
    assert traffic["waits"] <= WALKS[dtype, keep_graph] + 1  # the windows go there once
    assert traffic["uploads"] <= 1
    found = norms_of(on(DEVICE, dtype=getattr(torch, dtype)), keep_graph=keep_graph)
    assert len(sums) == BLOCKS and all(torch.equal(expected[key], found[key]) for key in expected)


PRUNING = [
    (method, pattern, variant, inverse)
    for method in METHODS
    for pattern in ("unstructured", "2:4", "8:16")
    for variant in (False, True)
    for inverse in (False, True)
    if ((METHODS[method].variant and pattern == "unstructured") or not variant) and (METHODS[method].inverse or not inverse)
]


@pytest.mark.parametrize("method, pattern, variant, inverse", PRUNING)
def test_pruned_weights_are_the_cpus_and_wait_for_the_device_once_a_block(method, pattern, variant, inverse):
    rule, weights = METHODS[method], []
    for device in (CPU, DEVICE):
        decoder = on(device)
        with counted() as traffic:
            prune_model(
                decoder,
                windows_on_host() if rule.statistic else None,
                method=method,
                sparsity=Sparsity.parse(pattern, 0.5),
                gradients=gradients_of(decoder) if rule.gradients else None,
                use_variant=variant,
                gradient_inv=inverse,
            )
        weights.append({name: tensor.cpu() for name, tensor in decoder.model.state_dict().items()})
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    entering = HEAD + 1 if rule.statistic else 0  # the windows go there once
    factors = BLOCKS * LINEARS if rule.solver else 0  # torch.cholesky_inverse looks whether it worked
    assert traffic["waits"] <= BLOCKS + entering + factors
    assert traffic["downloads"] <= BLOCKS
    assert traffic["uploads"] <= bool(rule.statistic) + rule.gradients * BLOCKS * LINEARS


@pytest.mark.parametrize("recipe", [*RECIPES, "obs"])
def test_what_updates_wait_for(recipe):
    steps, weights = RECIPES.get(recipe, Recipe("obs")), []
    for device in (CPU, DEVICE):
        decoder = on(device)
        with counted() as traffic:
            prune_model(decoder, windows_on_host(), method="wanda", sparsity=Sparsity.parse("2:4"), recipe=steps)
        weights.append({name: tensor.cpu() for name, tensor in decoder.model.state_dict().items()})
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    streams = 1 + steps.follows_dense
    entering = streams * (2 * N + 1) - 1  # the head, and the arguments against those before, of every sample of both streams
    trained = 3 + steps.epochs if steps.epochs else 0  # learning rates, the errors before and after each epoch, those to tell
    greedy = LINEARS if steps.update == "obs" else 0  # torch.cholesky_inverse
    assert traffic["waits"] <= entering + BLOCKS * (2 + trained + greedy)  # the zeros, the linears' errors
    assert traffic["downloads"] <= BLOCKS * (2 + (steps.epochs > 0))


def test_fingerprints_are_the_cpus_and_come_in_one_copy():
    here, there = on(CPU), on(DEVICE)
    with counted() as traffic:
        found = fingerprint.of_block(there, 1)
    assert max(traffic.values()) <= 1
    assert all(torch.equal(values, found[name]) for name, values in fingerprint.of_block(here, 1).items())


def test_hidden_states_on_the_host_cross_twice_a_block():
    weights = []
    for device in (CPU, DEVICE):
        decoder = on(device)
        with counted() as traffic:
            prune_model(decoder, windows_on_host(), method="wanda", sparsity=Sparsity.parse("2:4"), hidden_states=1)
        weights.append({name: tensor.cpu() for name, tensor in decoder.model.state_dict().items()})
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert traffic["uploads"] <= 1 + N * (BLOCKS + BLOCKS - 1)  # observed, then advanced, but for the last block
    assert traffic["downloads"] <= N + N * (BLOCKS - 1) + BLOCKS


@pytest.fixture(scope="module")
def shared(saved_model, documents, tmp_path_factory):
    """The flags both commands have, with a text."""
    folder = tmp_path_factory.mktemp("accelerator")
    text = folder / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    (folder / "short.txt").write_text(" ".join(documents)[:300])
    flags = ["--model", saved_model, "--dataset", text, "--nsamples", 4, "--seq_length", 16, "--cache_dir", folder]
    return folder, flags


@pytest.fixture(autouse=True)
def commands(monkeypatch):
    monkeypatch.setattr(loading, "resolve_device", loading.resolve_device)  # and back
    install()


@pytest.fixture(scope="module")
def gradients(shared):
    """A gradient folder, computed on the CPU."""
    folder, flags = shared
    with same_kernels():
        run("gradient_computation.py", *flags, "--device", "cpu", "--dtype", "float32", "--output_dir", folder / "cpu")
    return next((folder / "cpu").rglob("*_l2_*"))


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_gradient_command_writes_the_cpus_norms(shared, memory, dtype, tmp_path):
    _, flags = shared
    command = ["gradient_computation.py", *flags, "--dtype", dtype, "--memory", memory, "--activation_memory", 2e-5]
    for device in ("cpu", "standin"):
        run(*command, "--device", device, "--output_dir", tmp_path / device)
    for here in sorted((tmp_path / "cpu").rglob("gradients_*")):
        there = tmp_path / "standin" / here.relative_to(tmp_path / "cpu")
        for i in range(BLOCKS):
            expected, found = GradientNorms(here).block(i), GradientNorms(there).block(i)
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert GradientNorms(here).fingerprint == GradientNorms(there).fingerprint


@pytest.mark.parametrize(
    "method, more",
    [
        ("magnitude", ["--sparsity_ratio", 0.5]),
        ("wanda", ["--sparsity_ratio", 0.5, "--use_variant"]),
        ("gradient", ["--sparsity_ratio", 0.5]),
        ("gblm", ["--sparsity_type", "2:4"]),
        ("gblm", ["--sparsity_ratio", 0.5, "--gradient_inv", "--dtype", "bfloat16"]),
        ("sparsegpt", ["--sparsity_type", "2:4"]),
        ("wanda", ["--sparsity_type", "2:4", "--recipe", "fast"]),
        ("sparsegpt", ["--sparsity_ratio", 0.5, "--recipe", "best"]),
        ("magnitude", ["--sparsity_type", "2:4", "--update", "obs", "--stages", 2, "--dtype", "bfloat16"]),
        ("gblm", ["--sparsity_ratio", 0.5, "--alpha", "auto", "--layer_ratios", "line"]),
    ],
)
def test_the_pruning_command_writes_the_cpus_checkpoint(shared, gradients, method, more, tmp_path):
    folder, flags = shared
    command = [
        "main.py",
        *flags,
        "--dtype",
        "float32",
        "--prune_method",
        method,
        "--eval_dataset",
        folder / "short.txt",
        "--no_cache",
        *more,
    ]
    command += ["--gradient_path", gradients] if METHODS[method].gradients else []
    found = []
    for device, memory in (("cpu", "resident"), ("standin", "resident"), ("standin", "streamed")):
        out = tmp_path / f"{device}-{memory}"
        run(*command, "--device", device, "--memory", memory, "--save", out, "--save_model", out / "model")
        results = json.loads((out / "results.json").read_text())
        assert ("peak_gpu_gb" in results["phases"]["prune"]) == (device != "cpu")
        found.append((AutoModelForCausalLM.from_pretrained(out / "model").state_dict(), results["perplexity"]))
    expected, perplexity = found[0]
    for weights, other in found[1:]:
        assert other == perplexity
        assert all(torch.equal(tensor, weights[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("device, backends", [("cuda", {"cpu", "cuda"}), ("cpu", {"cpu"})])
def test_several_processes_add_up_what_is_on_the_host_too(monkeypatch, device, backends):
    """NCCL alone knows no host tensors, and the tokens that reached an expert are counted there."""
    started = []
    monkeypatch.setattr(torch.cuda, "set_device", started.append)
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda backend: started.append(backend))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parallel.start(torch.device(device)) == (torch.device("cuda", 1) if device == "cuda" else CPU)
    assert set(BackendConfig(Backend(started[-1])).get_device_backend_map()) >= backends
