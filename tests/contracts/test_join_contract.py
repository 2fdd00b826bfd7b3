"""What `deploy.join` listens for in a SuperNode's log is what Flower says when it gives up its link for good."""

import logging

import httpx
import pytest
from flwr.supercore.retry.http_retry import make_simple_http_retry_invoker

from deploy.join import GAVE_UP


def test_a_server_that_ends_a_handshake_makes_flower_give_up_with_the_words_that_the_site_waits_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call() -> None:
        raise httpx.ConnectError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol")

    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    with pytest.raises(httpx.ConnectError), caplog.at_level(logging.INFO, logger="flwr"):
        make_simple_http_retry_invoker().invoke(call)
    assert any(words in caplog.text for words in GAVE_UP)
