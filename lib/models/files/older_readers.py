"""What readers older than transformers 5 refuse or misread in a folder that transformers 5 has saved.

Such readers are transformers 4, mlx-lm, llama.cpp's converter. Where a setting is not under the name they know, they take their
own default for it, and say nothing.
"""

import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

THETA = "rope_theta"
THETA_NAMES = (THETA, "rotary_emb_base", "rope_local_base_freq")  # what older configs call it at their top level
PART_NAMES = ("partial_rotary_factor", "rotary_pct", "rope_pct", "rotary_dim")
NEW_CLASSES = ("TokenizersBackend", "SentencePieceBackend", "PythonBackend")  # of tokenizers, since transformers 5
READERS = "readers older than transformers 5 (transformers 4, mlx-lm, llama.cpp's converter)"


def older_readers(folder: str | Path) -> list[str]:
    """A warning for each thing in the folder of a model that such readers misread or refuse; a file that is missing or damaged
    has none."""
    config, tokenizer = (_read(Path(folder, file)) for file in ("config.json", "tokenizer_config.json"))
    warnings = [
        f"config.json has {what} in rope_parameters alone: {READERS} take their own default in silence; {remedy}"
        for what, remedy in _rope(config)
    ]
    if (name := tokenizer.get("tokenizer_class")) in NEW_CLASSES:
        warnings.append(
            f"tokenizer_config.json has the tokenizer_class {name}: {READERS} do not know it; where there is a tokenizer.json, "
            'write "tokenizer_class": "PreTrainedTokenizerFast"'
        )
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        warnings.append(
            f"tokenizer_config.json has extra_special_tokens as a list: {READERS} end in an error; call it "
            "additional_special_tokens"
        )
    return warnings


def _rope(config: dict[str, Any]) -> list[tuple[str, str]]:
    """(what only rope_parameters say, what to do about it), of a config and of those inside it, such as text_config."""
    missing = [pair for inner in config.values() if isinstance(inner, dict) for pair in _rope(inner)]
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return missing
    layers = {f" of {kind}": one for kind, one in rope.items() if isinstance(one, dict)} or {"": rope}
    defaults = _default_thetas(config)
    for kind, one in layers.items():
        theta, type_, part = one.get(THETA), one.get("rope_type", "default"), one.get("partial_rotary_factor", 1.0)
        if theta is not None and not _has(config, THETA_NAMES) and theta not in defaults:
            missing.append((f"{THETA} {theta:g}{kind}", f'write "{THETA}": {json.dumps(theta)} at its top level as well'))
        if type_ != "default" and not config.get("rope_scaling"):
            missing.append((f"the rope_type {type_}{kind}", "write it as rope_scaling at its top level as well"))
        if part != 1.0 and not _has(config, PART_NAMES):
            missing.append(
                (f"partial_rotary_factor {part:g}{kind}", f'write "partial_rotary_factor": {part:g} at its top level as well')
            )
    return missing


def _has(config: dict[str, Any], names: tuple[str, ...]) -> bool:
    return any(config.get(name) is not None for name in names)


def _default_thetas(config: dict[str, Any]) -> list[float]:
    """What readers take where a model of this type has no rope_theta; there may be one for each kind of layer."""
    try:
        default = getattr(CONFIG_MAPPING[config["model_type"]], "default_theta", None)
    except KeyError:  # a type that transformers does not know
        return []
    return list(default.values()) if isinstance(default, dict) else [default]


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # said by whoever needs the file
        return {}
    return content if isinstance(content, dict) else {}
