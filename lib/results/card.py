"""The model card (README.md) of a pruned checkpoint: what the hub wants to know, and what was done to the dense model."""

import json
import re
from pathlib import Path

import yaml
from huggingface_hub import CardData, metadata_load

from lib.atomic import replace_file
from lib.models.files.checkpoint import Checkpoint
from lib.results import tables

CARD = "README.md"
INHERITED = ("license", "license_name", "license_link", "language")  # from the dense model's own card
RECIPE = (
    "prune_method", "sparsity_type", "sparsity_ratio", "use_variant", "gradient_inv", "include", "exclude", "layer_no",
    "layer_ratios", "recipe", "update", "stages", "asymmetric", "reconstruct",
)  # fmt: skip
CALIBRATION = ("dataset", "nsamples", "seq_length", "seed", "bos", "pack")
UNUSED = {"layer_no": -1, "update": "none", "stages": 1, "asymmetric": 0, "reconstruct": 0}  # what a flag has that did nothing
SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")  # where the hub's cache keeps OWNER/NAME
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def write(folder: str | Path, results: dict, command: str, calibrated: bool) -> None:
    """Put the card into a finished checkpoint, in place of the dense model's, whose licence it takes over.

    `results` are as in results.json, `command` is what a reader would type, `calibrated` whether text had a part in it.
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
    """The name on the hub of the model that was pruned, or of the one that it was made from; None if nothing tells.

    `model` is --model; `config` its config.json, `dense` the front matter of its card.
    """
    if not Path(model).is_dir():
        return model
    if cached := SNAPSHOT.search(Path(model).absolute().as_posix() + "/"):
        return "/".join(cached.groups())
    said = config.get("_name_or_path") or ""
    if HUB_NAME.fullmatch(said) and not Path(said).exists():
        return said
    return dense.get("base_model")


def body(results: dict, command: str, calibrated: bool, updated: bool) -> str:
    """The card below its front matter. `updated`: the surviving weights are not the dense model's."""
    flags = results["flags"] | results.get("chosen", {})
    name, method = Path(flags["model"]).name, flags["prune_method"]
    shown = RECIPE + (CALIBRATION if calibrated else ())
    recipe = [(flag, value) for flag in shown if _used(flag, value := flags.get(flag))]
    recipe += [("alpha", flags["alpha"])] if method == "gblm" else []
    recipe += [("chosen on calibration text left out", ", ".join(results["chosen"]))] if "chosen" in results else []
    survivors = "were updated, they are not the dense model's" if updated else "are the dense model's, bit for bit"
    parts = [
        f"# {name}, pruned with {method}",
        f"{name} with {results['sparsity']:.2%} of the weights of its decoder blocks' linear layers set to zero, in one shot "
        "and without retraining, by GBLM-Pruner, the tool of *Beyond Size: How Gradients Shape Pruning Decisions in Large "
        f"Language Models* ([arXiv 2311.04902](https://arxiv.org/abs/2311.04902)). The weights that are not zero {survivors}. "
        "Everything but this card is as in the dense model's folder, so it loads wherever that does; its file is as large, "
        "because a zero takes as many bytes as any other weight.",
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


def _used(flag: str, value) -> bool:
    return value is not None and value is not False and value != [] and (flag not in UNUSED or value != UNUSED[flag])


def _plain(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _metadata(card: Path) -> dict:
    """The front matter of the dense model's card; {} where it has none that can be read."""
    try:
        return metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
