"""The log texts on which the supervisor restarts a SuperNode are those that Flower writes."""

import logging
from types import SimpleNamespace

import httpx
import pytest
from flwr.supercore.retry.http_retry import make_simple_http_retry_invoker
from flwr.supernode.start_client_internal import RunNotRunningException, _pull_and_store_message

from fedsgcg.deploy.site.supervisor import LINK_GIVEN_UP, STUCK


@pytest.fixture
def said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    """Flower's own log lines."""
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    caplog.set_level(logging.INFO, logger="flwr")
    return caplog


def reasons(text: str) -> set[str]:
    return {why for words, why in STUCK.items() if words in text}


def test_flower_gives_up_with_the_expected_text_if_a_server_ends_the_handshake(
    said: pytest.LogCaptureFixture,
) -> None:
    def call() -> None:
        raise httpx.ConnectError(
            "[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol"
        )

    with pytest.raises(httpx.ConnectError):
        make_simple_http_retry_invoker().invoke(call)
    assert reasons(said.text) == {LINK_GIVEN_UP}


def test_flower_logs_the_expected_text_when_a_run_is_stopped_while_its_message_arrives(
    said: pytest.LogCaptureFixture,
) -> None:
    metadata = SimpleNamespace(run_id=7, group_id="", message_id="ab12", message_type="train")

    def stopped(run_id: int) -> None:
        raise RunNotRunningException

    nothing = SimpleNamespace(get_run=lambda run_id: None)
    pulled = _pull_and_store_message(
        state=nothing,
        object_store=nothing,
        node_config={},
        receive=lambda: (SimpleNamespace(metadata=metadata), None),
        get_run=stopped,
        get_fab=stopped,
        pull_object=stopped,
        confirm_message_received=stopped,
        trusted_entities=None,
    )
    assert pulled is None
    assert reasons(said.text) == set(STUCK.values()) - {LINK_GIVEN_UP}
