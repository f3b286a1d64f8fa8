"""The Hugging Face hub: whether it answers is settled once, in seconds; if it does not, what is cached is all there is."""

import threading
from functools import cache

import datasets
from huggingface_hub import constants
from huggingface_hub.utils import get_session

PATIENCE = 2.5  # seconds; the libraries themselves would try six times, for half a minute a file


def reachable() -> bool:
    """Whether the hub can be asked. Once it has not answered, the libraries that would ask it look in their caches only."""
    if constants.is_offline_mode():
        return False
    if not _answers(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    return not constants.is_offline_mode()


def why_not() -> str:
    """Why a file that is not cached cannot be had, where the hub is not `reachable`."""
    return f"the hub ({constants.ENDPOINT}) is out of reach, or HF_HUB_OFFLINE is set"


@cache
def _answers(endpoint: str) -> bool:
    """Any answer counts, an error of the server's too."""
    answered = threading.Event()

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=PATIENCE)
            answered.set()
        except Exception:  # of the HTTP library, of a proxy's settings: for whatever reason, there is no answer
            pass
        done.set()

    done = threading.Event()
    threading.Thread(target=ask, daemon=True).start()  # looking a name up has no time limit of its own
    done.wait(PATIENCE)
    return answered.is_set()


def page(repository: str) -> str:
    """Where a person looks at a model."""
    return f"{constants.ENDPOINT}/{repository}"
