"""The Hugging Face hub: whether it can be reached is known in seconds; a file of it to a path on this machine."""

import os
import threading
from collections.abc import Callable
from functools import cache

from huggingface_hub import constants, get_hf_file_metadata, get_session, hf_hub_download, hf_hub_url
from huggingface_hub.errors import LocalEntryNotFoundError

from lib.errors import OutOfReach

PATIENCE = float(
    os.environ.get("HF_HUB_ETAG_TIMEOUT", 10)
)  # seconds for the hub's first answer, as many as its library's default


def fetch(repository: str, file: str, *, repo_type: str, cache_dir: str | None = None) -> str:
    """The path of a file of a repository, downloaded if the hub's cache does not hold it.

    What is cached is used without asking the hub, so a run is the same with a network and without.

    Raises:
        ConnectionError: it is not cached, and the hub does not answer (within `PATIENCE`) or does not give it away.
    """
    options = {"repo_type": repo_type, "cache_dir": cache_dir}
    try:
        return hf_hub_download(repository, file, local_files_only=True, **options)
    except LocalEntryNotFoundError:
        pass
    try:
        url = hf_hub_url(repository, file, repo_type=repo_type)
        _in_time(lambda: get_hf_file_metadata(url, timeout=2 * PATIENCE))
        return hf_hub_download(repository, file, **options)
    except Exception as error:  # of whichever HTTP client the hub's library has at the moment
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OutOfReach(f"{repository}/{file} is not in the hub's cache and cannot be fetched ({reason})") from error


def reachable() -> bool:
    """Whether the hub can be asked. Once it has not answered, all that would ask it look in its cache only, and at once."""
    if not constants.is_offline_mode() and not _answers(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True
    return not constants.is_offline_mode()


def why_not() -> str:
    """Why a file that is not cached cannot be had, where the hub is not `reachable`."""
    return f"the hub ({constants.ENDPOINT}) is out of reach, or HF_HUB_OFFLINE is set"


def page(repository: str) -> str:
    """Where a person looks at a model."""
    return f"{constants.ENDPOINT}/{repository}"


@cache
def _answers(endpoint: str) -> bool:
    try:
        _in_time(lambda: get_session().head(endpoint, timeout=PATIENCE))  # any answer counts, an error of the server's too
    except Exception:  # of whichever HTTP client, of a proxy's settings: for whatever reason, there is none
        return False
    return True


def _in_time(ask: Callable[[], object]) -> None:
    """Raise, in `PATIENCE` seconds at most, what stands between us and the hub; its library would try for half a minute."""
    outcome: list[Exception | None] = []

    def asking() -> None:
        try:
            ask()
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    # In a thread: no timeout covers the look-up of the hub's name.
    thread = threading.Thread(target=asking, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if not outcome:
        raise TimeoutError(f"no answer in {PATIENCE:g} s, HF_HUB_ETAG_TIMEOUT is how long to wait")
    if outcome[0] is not None:
        raise outcome[0]
