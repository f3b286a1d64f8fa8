"""The Hugging Face hub: finds out in seconds whether it can be reached, and brings a file of it to this machine."""

import os
import threading
from collections.abc import Callable
from functools import cache

from huggingface_hub import constants, get_hf_file_metadata, get_session, hf_hub_download, hf_hub_url
from huggingface_hub.errors import LocalEntryNotFoundError

from lib.errors import OutOfReach

# Seconds that the hub has for its first answer, with the default of its library.
PATIENCE = float(os.environ.get("HF_HUB_ETAG_TIMEOUT", 10))


def fetch(repository: str, file: str, *, repo_type: str, cache_dir: str | None = None) -> str:
    """The path of a file of a repository, which is downloaded if it is not in the hub's cache.

    A cached file is used without asking the hub, so a run is the same with a network and without.

    Raises:
        OutOfReach: it is not cached, and the hub does not answer within `PATIENCE` or refuses to send it.
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
    except Exception as error:  # its type depends on the HTTP client that the hub's library uses
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OutOfReach(f"{repository}/{file} is not in the hub's cache and cannot be fetched ({reason})") from error


def reachable() -> bool:
    """Whether the hub can be asked. If it does not answer, everything from now on uses its cache only, without waiting."""
    if not constants.is_offline_mode() and not _answers(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True
    return not constants.is_offline_mode()


def why_not() -> str:
    """Why a file that is not cached cannot be fetched when the hub is not `reachable`."""
    return f"the hub ({constants.ENDPOINT}) is out of reach, or HF_HUB_OFFLINE is set"


def page(repository: str) -> str:
    """The web page of a model."""
    return f"{constants.ENDPOINT}/{repository}"


@cache
def _answers(endpoint: str) -> bool:
    try:
        _in_time(lambda: get_session().head(endpoint, timeout=PATIENCE))  # any answer counts, even a server error
    except Exception:  # whatever the reason, from the HTTP client or a proxy's settings: there is no answer
        return False
    return True


def _in_time(ask: Callable[[], object]) -> None:
    """Raise within `PATIENCE` seconds what `ask` raises, or TimeoutError; the hub's library would try for half a minute."""
    outcome: list[Exception | None] = []

    def asking() -> None:
        try:
            ask()
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    # It runs in a thread because no timeout covers the look-up of the hub's name.
    thread = threading.Thread(target=asking, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if not outcome:
        raise TimeoutError(f"no answer in {PATIENCE:g} s, HF_HUB_ETAG_TIMEOUT sets how long to wait")
    if outcome[0] is not None:
        raise outcome[0]
