"""The hub that is not there: tests connect to this machine alone."""

import socket
import time
from collections.abc import Iterator

import pytest

constants = pytest.importorskip("huggingface_hub.constants")

from qnas.nn.pretrained.hub import hub_problem, only_cached  # noqa: E402  # huggingface_hub comes with the extra timm


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(5)
        yield server


def address(server: socket.socket) -> str:
    return f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_refused_connection_is_said_at_once(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address(listening))
    listening.close()
    started = time.monotonic()
    problem = hub_problem()
    assert problem.startswith(f"{constants.ENDPOINT} cannot be reached (")
    assert len(problem.splitlines()) == 1
    assert time.monotonic() - started < 4, "no retries"


def test_a_server_that_never_answers_is_not_waited_for(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address(listening))
    started = time.monotonic()
    assert hub_problem(0.2).startswith(constants.ENDPOINT)
    assert time.monotonic() - started < 4


def test_the_offline_mode_needs_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_problem() == "HF_HUB_OFFLINE is set"


def test_without_the_hub_its_client_is_offline_and_online_again_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def fail() -> None:
        assert constants.HF_HUB_OFFLINE
        assert socket.getdefaulttimeout() == 3.0
        raise KeyError

    with pytest.raises(KeyError), only_cached(3.0):
        fail()
    assert not constants.HF_HUB_OFFLINE
    assert socket.getdefaulttimeout() is None
