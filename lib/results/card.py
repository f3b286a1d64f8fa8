"""The model card (README.md) of a pruned checkpoint: the metadata that the hub asks for, and what was done to the dense model."""

import json
import re
from pathlib import Path

import yaml
from huggingface_hub import CardData, metadata_load

from lib.atomic import replace_file
from lib.models.files.checkpoint import Checkpoint
from lib.results import tables
from lib.results.read import WITHOUT_EFFECT

CARD = "README.md"
INHERITED = ("license", "license_name", "license_link", "language")  # metadata taken over from the dense model's card
# The flags that the card names, unless they had no effect.
PRUNING_FLAGS = (
    "prune_method", "sparsity_type", "sparsity_ratio", "use_variant", "gradient_inv", "include", "exclude", "layer_no",
    "layer_ratios", "recipe", "update", "stages", "asymmetric", "reconstruct",
)  # fmt: skip
CALIBRATION_FLAGS = ("dataset", "nsamples", "seq_length", "seed", "bos", "pack")
SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")  # the folder of OWNER/NAME in the hub's cache
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def write(folder: str | Path, results: dict, command: str, calibrated: bool) -> None:
    """Write the card of a finished checkpoint, in place of the dense model's card, whose licence it takes over.

    `results` are those of results.json, `command` is the command line that made the checkpoint, and `calibrated` says whether
    calibration text was used.
    """
    place, config = Path(folder, CARD), json.loads(Path(folder, "config.json").read_text())
    dense = _metadata(place)
    metadata = {
        "base_model": base_model(results["flags"]["model"], config, dense),
        "license": config.get("license"),
        **{key: dense[key] for key in INHERITED if key in dense},
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "sparse", "gblm-pruner", results["flags"]["prune_method"], results["flags"]["sparsity_type"]],
    }
    updated = Checkpoint(str(folder)).updated
    text = f"---\n{CardData(**metadata).to_yaml()}\n---\n\n{body(results, command, calibrated, updated)}"
    replace_file(place, lambda path: path.write_text(text, encoding="utf-8"))


def base_model(model: str, config: dict, dense: dict) -> str | list[str] | None:
    """The hub name of the model that was pruned, or of the model that it was made from; None if neither is known.

    `model` is the value of --model, `config` its config.json, and `dense` the front matter of its card.
    """
    if not Path(model).is_dir():
        return model
    if cached := SNAPSHOT.search(Path(model).absolute().as_posix() + "/"):
        return "/".join(cached.groups())
    recorded = config.get("_name_or_path") or ""
    if HUB_NAME.fullmatch(recorded) and not Path(recorded).exists():
        return recorded
    return dense.get("base_model")


def body(results: dict, command: str, calibrated: bool, updated: bool) -> str:
    """The card below its front matter. `updated` says that the surviving weights are not the dense model's."""
    flags = results["flags"] | results.get("chosen", {})
    name, method = Path(flags["model"]).name, flags["prune_method"]
    named = PRUNING_FLAGS + (CALIBRATION_FLAGS if calibrated else ())
    recipe = [(flag, value) for flag in named if _has_effect(flag, value := flags.get(flag))]
    recipe += [("alpha", flags["alpha"])] if method == "gblm" else []
    recipe += [("found by a search on held-out calibration text", ", ".join(results["chosen"]))] if "chosen" in results else []
    survivors = "were updated, they are not the dense model's" if updated else "are the dense model's, bit for bit"
    parts = [
        f"# {name}, pruned with {method}",
        f"{name} with {results['sparsity']:.2%} of the weights of its decoder blocks' linear layers set to zero, in one shot "
        "and without retraining, by GBLM-Pruner, the tool of *Beyond Size: How Gradients Shape Pruning Decisions in Large "
        f"Language Models* ([arXiv 2311.04902](https://arxiv.org/abs/2311.04902)). The weights that are not zero {survivors}. "
        "Apart from this card and the weights, everything is as in the dense model's folder, so the model loads wherever the "
        "dense one does. Its files are as large, because a zero takes as many bytes as any other weight.",
        "## Results",
        tables.perplexities(results),
        *([tables.zero_shot(results)] if "zero_shot" in results else []),
        "## Recipe",
        tables.table(["flag", "value"], [[flag, _plain(value)] for flag, value in recipe]),
        f"```bash\n{command}\n```",
        "With " + ", ".join(f"{package} {number}" for package, number in results["versions"].items())
        + f"; computed in {results['dtype']} on {results['device']}.",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _has_effect(flag: str, value) -> bool:
    off = value is None or value is False or value == []  # 0 is a value, such as that of --seed
    return not off and (flag not in WITHOUT_EFFECT or value != WITHOUT_EFFECT[flag])


def _plain(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _metadata(card: Path) -> dict:
    """The front matter of the dense model's card; {} if there is none, or none that can be read."""
    try:
        return metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
