"""Write a LLaMA-shaped checkpoint with random weights, to try memory and speed at a size without downloading it.

    python scripts/benchmarks/make_checkpoint.py big/Llama-2-7b-shaped

Defaults: the shape of LLaMA-2-7B, bfloat16, 13.5 GB. A block is made, written and dropped, so the script needs the memory of
one block. The tokenizer splits text into bytes. Perplexities of such a model mean nothing.
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="to be made")
    parser.add_argument("--hidden", type=int, default=4096, help="size of a hidden state (default: %(default)s)")
    parser.add_argument("--intermediate", type=int, default=11008, help="width of the MLP (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=32, help="decoder blocks (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=32, help="attention heads (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=32000, help="tokens (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="draws the random numbers; a GPU is faster (default: %(default)s)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)

    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.blocks,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=4096,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(args.folder)
    with init_empty_weights():
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        block = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{block}.safetensors", []).append(name)
    generator = torch.Generator(args.device).manual_seed(0)
    for shard, names in tqdm(shards.items(), unit="shard", disable=None):
        tensors = {}
        for name in names:
            if len(shapes[name]) == 1:
                tensors[name] = torch.ones(shapes[name], dtype=torch.bfloat16)
            else:
                empty = torch.empty(shapes[name], dtype=torch.bfloat16, device=args.device)
                tensors[name] = empty.normal_(std=0.02, generator=generator).cpu()
        save_file(tensors, args.folder / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    index = {"metadata": {"total_size": 2 * sum(shape.numel() for shape in shapes.values())}, "weight_map": weight_map}
    (args.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(args.folder)
    print(f"{sum(shape.numel() for shape in shapes.values()) / 1e9:.2f} billion weights in {args.folder}")


if __name__ == "__main__":
    main()
