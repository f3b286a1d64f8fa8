"""A file of the Hugging Face hub to a path on this machine; without a network, what is cached already, or one error soon."""

import os
import threading

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import LocalEntryNotFoundError

PATIENCE = float(os.environ.get("HF_HUB_ETAG_TIMEOUT", 2.5))  # seconds for the hub's first answer


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
        _ask(hf_hub_url(repository, file, repo_type=repo_type))
        return hf_hub_download(repository, file, **options)
    except Exception as error:  # of whichever HTTP client the hub's library has at the moment
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConnectionError(f"{repository}/{file} is not in the hub's cache and cannot be fetched ({reason})") from error


def _ask(url: str) -> None:
    """Raise, in `PATIENCE` seconds at most, what stands between us and a file; a download alone would try for half a minute."""
    outcome: list[Exception | None] = []

    def ask() -> None:
        try:
            get_hf_file_metadata(url, timeout=2 * PATIENCE)
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    # In a thread: no timeout covers the look-up of the hub's name.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    if not outcome:
        raise TimeoutError(f"no answer in {PATIENCE:g} s, HF_HUB_ETAG_TIMEOUT is how long to wait")
    if outcome[0] is not None:
        raise outcome[0]
