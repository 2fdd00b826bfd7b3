"""One exchange: a request to some sites, and their answers until a deadline.

Flower's `send_and_receive` sleeps three seconds between looks and returns nothing until all is there; this one hands
over each answer when it comes and never waits longer than the deadline. An error that Flower itself reports may carry
the SuperLink's node id and free text of a site (stack.md 3.4): the site is told by the id of the request, and the text
is dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.errors import CODES, FedsgcgError, Problem
from common.wire import Reply, Request, decode_reply, encode_request, payload_bytes

FIRST_PAUSE_S = 0.002
LONGEST_PAUSE_S = 0.1
TTL_MARGIN_S = 60.0


@dataclass(frozen=True)
class Answer:
    """What came of a request to one site: a reply, or a problem.

    Attributes:
        site: The site that was asked.
        reply: The decoded reply; None when there is a problem.
        problem: Why there is no reply.
        bytes_down: Bytes of the request.
        bytes_up: Bytes of the reply.
        stated: Name that a site which failed gave itself.
    """

    site: str
    reply: Reply | None = None
    problem: Problem | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    stated: str = ""


OnAnswer = Callable[[Answer], None]


def ignore_answer(answer: Answer) -> None:
    """Do nothing with an answer before all are there."""


def exchange(
    grid: Grid,
    nodes: Mapping[str, int],
    message_type: str,
    request: Request,
    *,
    deadline_s: float,
    on_answer: OnAnswer = ignore_answer,
) -> list[Answer]:
    """Send one request to several sites and collect their answers.

    Args:
        grid: Flower's grid.
        nodes: Site -> node id of everyone to ask.
        message_type: Flower's message type, e.g. `common.wire.TRAIN`.
        request: The request; encoded once for all.
        deadline_s: Seconds after which a missing answer becomes RND-404.
        on_answer: Called with each answer when it comes.

    Returns:
        One answer a site, in the order of the sites' names.
    """
    end = time.monotonic() + deadline_s
    content = encode_request(request)
    size = sum(payload_bytes(content).values())
    pending: dict[str, str] = {}
    for site in sorted(nodes):
        if identifier := push(grid, content, message_type, nodes[site], deadline_s):
            pending[identifier] = site
    answers: dict[str, Answer] = {}
    pause = FIRST_PAUSE_S
    while pending:
        before = len(pending)
        for message in grid.pull_messages(sorted(pending)):
            site = pending.pop(message.metadata.reply_to_message_id, "")
            if site:  # a second reply to the same request is ignored
                answers[site] = read_answer(message, site, size)
                on_answer(answers[site])
        if not pending or time.monotonic() >= end:
            break
        pause = FIRST_PAUSE_S if len(pending) < before else min(1.5 * pause, LONGEST_PAUSE_S)
        time.sleep(min(pause, max(0.0, end - time.monotonic())))
    for site in sorted(set(nodes) - set(answers)):
        answers[site] = Answer(site, problem=missing(site, message_type, deadline_s), bytes_down=size)
        on_answer(answers[site])
    return [answers[site] for site in sorted(answers)]


def push(grid: Grid, content: RecordDict, message_type: str, node: int, deadline_s: float) -> str:
    """Send one message; returns its id, or "" when the grid would not take it (a node that has left)."""
    message = Message(content, node, message_type, ttl=deadline_s + TTL_MARGIN_S)
    identifiers = list(grid.push_messages([message]))  # one by one: a grid may leave refused ones out of the list
    return (identifiers[0] or "") if identifiers else ""


def read_answer(message: Message, site: str, bytes_down: int = 0) -> Answer:
    """Decode a reply; whatever is wrong with it becomes the answer's problem and goes no further."""
    if message.has_error():
        found = f"Flower's error {message.error.code}"
        return Answer(site, problem=Problem("SITE-500", where=site, found=found), bytes_down=bytes_down)
    try:
        reply = decode_reply(message.content)
        size = sum(payload_bytes(message.content).values())
        if not isinstance(reply.details, dict):
            raise TypeError("details that are no dictionary")
    except FedsgcgError as error:
        # What was found may quote the site's text; the code says what was wrong.
        return Answer(site, problem=Problem(error.code, where=site), bytes_down=bytes_down)
    except Exception as error:  # what a decoder raises for hostile bytes is an open list; none may stop the others
        found = f"a reply that cannot be read ({type(error).__name__})"
        return Answer(site, problem=Problem("PAY-106", where=site, found=found), bytes_down=bytes_down)
    if reply.error:
        known = reply.error in CODES
        problem = Problem(
            reply.error if known else "SITE-500", where=site, found="" if known else "an unknown error code"
        )
        return Answer(site, problem=problem, bytes_down=bytes_down, bytes_up=size, stated=reply.site)
    return Answer(site, reply=reply, bytes_down=bytes_down, bytes_up=size)


def missing(site: str, message_type: str, deadline_s: float) -> Problem:
    """The problem of a site that has not answered."""
    found = f"no answer to {message_type!r} within {deadline_s:g} s"
    return Problem(
        "RND-404", where=site, found=found, action="look at the site's own log; it is asked again next round"
    )
