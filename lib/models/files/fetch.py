"""Where a model is on this machine: in a folder of the user's, or in the hub's cache, which its files are fetched to."""

import json
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from lib.errors import InvalidInput, MissingInput
from lib.models.files import hub
from lib.models.files.checkpoint import WEIGHT_FILES

LOGIN = "log in with `hf auth login`"


def check_name(name: str, revision: str | None = None) -> None:
    """Raise MissingInput or InvalidInput, before anything is asked of the hub, if `name` cannot be a model.

    A model is a folder, which has no revision, or a name on the hub: OWNER/NAME.
    """
    folder = Path(name)
    if name and folder.is_dir():
        if revision is not None:
            raise InvalidInput(f"--revision {revision} is of a model on the hub, and {name} is a folder: leave the flag out")
    elif folder.is_file():
        raise InvalidInput(f"{name} is a file: give the folder that it is in, with {CONFIG_NAME} and safetensors beside it")
    elif not name or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise MissingInput(
            f"{name or repr(name)} is not a folder, and cannot be a model on the hub: those are called OWNER/NAME"
        )


def folder(name: str, *, revision: str | None = None, cache_dir: str | None = None, weights: bool = False) -> str:
    """The folder of a model: `name` itself, or its snapshot in the hub's cache, which has its weights only if `weights`.

    Raises:
        MissingInput: there is no such model, it is private, or it is not cached and the hub does not answer.
        InvalidInput: the name cannot be one on the hub, access must be asked for, or there is no such revision.
    """
    check_name(name, revision)
    if Path(name).is_dir():
        _refuse_adapter(name, Path(name))
        if not Path(name, CONFIG_NAME).is_file():
            raise MissingInput(f"{name} has no {CONFIG_NAME}, so it is not a model: give a folder that save_pretrained wrote")
        return name
    hub.reachable()
    try:
        snapshot = snapshot_download(name, revision=revision, cache_dir=cache_dir, ignore_patterns=list(WEIGHT_FILES))
        for wanted in _weight_files(Path(snapshot)) if weights else ():
            snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=wanted)
            if Path(snapshot, wanted[0]).is_file():
                break
    except HFValidationError as error:
        raise InvalidInput(f"{name!r} is neither a folder nor a name on the hub, OWNER/NAME: check it") from error
    except GatedRepoError as error:
        raise InvalidInput(f"{name} is only for those who have access: ask for it at {hub.page(name)}, then {LOGIN}") from error
    except RepositoryNotFoundError as error:
        raise MissingInput(f"the hub has no model {name}, or it is private: check the name, or {LOGIN}") from error
    except RevisionNotFoundError as error:
        raise InvalidInput(f"{name} has no revision {revision}: see {hub.page(name)}/commits") from error
    except LocalEntryNotFoundError as error:
        which = f"{name} (revision {revision})" if revision else name
        raise MissingInput(
            f"{which} is neither a folder here nor in the hub's cache, and {hub.why_not()}: give --model a folder, or connect"
        ) from error
    _refuse_adapter(name, Path(snapshot))
    if not Path(snapshot, CONFIG_NAME).is_file():
        raise MissingInput(f"{name} has no {CONFIG_NAME} (in {snapshot}): it is not a model, or was fetched only in part")
    return snapshot


def _refuse_adapter(name: str, folder: Path) -> None:
    """Refuse a folder with an adapter in it: transformers would load the model with it where peft is installed, and without it
    elsewhere."""
    for file in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        if (folder / file).exists():
            raise InvalidInput(
                f"{name} holds an adapter ({file}), whose weights are not the model's: merge it first (merge_and_unload of peft, "
                "then save_pretrained), or move its files away"
            )


def _weight_files(snapshot: Path) -> Iterator[list[str]]:
    """Yield the sets of files that transformers looks for, in its order. Only the first set that exists is needed."""
    for index, single in ((SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME), (WEIGHTS_INDEX_NAME, WEIGHTS_NAME)):
        yield [single]
        if (snapshot / index).is_file():
            yield sorted(set(json.loads((snapshot / index).read_text())["weight_map"].values()))
