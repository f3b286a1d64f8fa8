"""Write a checkpoint of a known shape with random weights, to try memory and speed without a download.

    python scripts/benchmarks/make_checkpoint.py big/Llama-2-7b-shaped
    python scripts/benchmarks/make_checkpoint.py big/Qwen3-30B-A3B-shaped --shape qwen3-30b-a3b --blocks 6

Weights are in bfloat16: LLaMA-2-7B takes 13.5 GB, and Qwen3-30B-A3B 1.2 GB and as much again for every block. Blocks are made
and written one by one, so the script needs the memory of one block. The tokenizer splits text into bytes. Perplexities of such a
model mean nothing.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

SHAPES = {
    "llama-2-7b": (
        LlamaConfig,
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000},
    ),
    "qwen3-30b-a3b": (
        Qwen3MoeConfig,
        {
            "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
            "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
            "vocab_size": 151936,
        },
    ),
}  # fmt: skip


def tensors_of_files(model: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    """(name, shape) of the tensors as files on the hub have them: the experts of a mixture one by one, not stacked."""
    for name, tensor in model.state_dict().items():
        owner, _, kind = name.rpartition(".experts.")
        if not owner:
            yield name, tensor.shape
            continue
        for e in range(len(tensor)):
            for part in ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,):
                rows = tensor.shape[1] // 2 if kind == "gate_up_proj" else tensor.shape[1]
                yield f"{owner}.experts.{e}.{part}.weight", torch.Size((rows, tensor.shape[2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to make")
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b", help="model whose shape it has (default: %(default)s)")
    parser.add_argument("--hidden", type=int, help="size of a hidden state (default: the model's)")
    parser.add_argument("--intermediate", type=int, help="width of the MLP, or of an expert (default: the model's)")
    parser.add_argument("--blocks", type=int, help="number of decoder blocks (default: the model's)")
    parser.add_argument("--heads", type=int, help="number of attention heads (default: the model's)")
    parser.add_argument("--vocabulary", type=int, help="number of tokens (default: the model's)")
    parser.add_argument(
        "--device", default="cpu", help="device that draws the random numbers; a GPU is faster (default: %(default)s)"
    )
    args = parser.parse_args()
    args.folder.mkdir(parents=True)

    config = config_of(args)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(args.folder)
    shapes = dict(tensors_of_files(model))
    write_weights(args.folder, shapes, args.device)
    write_tokenizer(args.folder)
    print(f"{sum(shape.numel() for shape in shapes.values()) / 1e9:.2f} billion weights in {args.folder}")


def config_of(args: argparse.Namespace) -> PretrainedConfig:
    """The config of the model whose shape is asked for, with the sizes that the flags change."""
    config_class, sizes = SHAPES[args.shape]
    width = "moe_intermediate_size" if "moe_intermediate_size" in sizes else "intermediate_size"
    changes = {
        "hidden_size": args.hidden,
        width: args.intermediate,
        "num_hidden_layers": args.blocks,
        "num_attention_heads": args.heads,
        "vocab_size": args.vocabulary,
    }
    if "num_key_value_heads" not in sizes:
        changes["num_key_value_heads"] = args.heads
    sizes = sizes | {key: size for key, size in changes.items() if size is not None}
    return config_class(**sizes, max_position_embeddings=4096, dtype="bfloat16")


def write_weights(folder: Path, shapes: dict[str, torch.Size], device: str) -> None:
    """Write random weights, a file for each block and one for the rest, and their index; vectors are ones."""
    shards: dict[str, list[str]] = {}
    for name in shapes:
        block = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{block}.safetensors", []).append(name)
    generator = torch.Generator(device).manual_seed(0)
    for shard, names in tqdm(shards.items(), unit="shard", disable=None):
        tensors = {}
        for name in names:
            if len(shapes[name]) == 1:
                tensors[name] = torch.ones(shapes[name], dtype=torch.bfloat16)
            else:
                empty = torch.empty(shapes[name], dtype=torch.bfloat16, device=device)
                tensors[name] = empty.normal_(std=0.02, generator=generator).cpu()
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    index = {"metadata": {"total_size": 2 * sum(shape.numel() for shape in shapes.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer that splits text into bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
