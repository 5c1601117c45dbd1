"""The Hugging Face Hub, where timm has its weights: whether it answers, and loading without it.

The hub's own client repeats every request five times, for three quarters of a minute without a connection. So
it is asked once, with a time limit, before anything is loaded. Without an answer, only its cache is used.
"""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from qnas.common.errors import one_line

ANSWER_SECONDS = (
    5.0  # for one answer; the name's look-up, which has no limit of its own, is not waited for longer
)


def hub_problem(seconds: float = ANSWER_SECONDS) -> str:
    """Return why the hub cannot be used, in a few words, within some seconds; empty if it answers."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # its documented place

    where = one_line(constants.ENDPOINT, 60)
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    found = [f"{where} does not answer within {seconds:.0f} s"]

    def ask() -> None:
        try:
            # the client's own session, which knows proxies and the offline mode
            answer = get_session().head(constants.ENDPOINT, timeout=seconds)
        except Exception as error:  # of the HTTP library, which differs by version
            found[0] = f"{where} cannot be reached ({one_line(error, 60)})"
        else:
            busy = answer.status_code >= 500
            found[0] = f"{where} answers with an error, {answer.status_code}" if busy else ""

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds + 1)
    return found[0]


@contextmanager
def only_cached(seconds: float = ANSWER_SECONDS) -> Iterator[None]:
    """Let the hub's client use its local cache alone, and limit the wait for other servers."""
    from huggingface_hub import constants

    offline, timeout = constants.HF_HUB_OFFLINE, socket.getdefaulttimeout()
    constants.HF_HUB_OFFLINE = True
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        socket.setdefaulttimeout(timeout)
