"""One exchange: a request to some sites, and their answers until a deadline.

Flower's `send_and_receive` sleeps three seconds between looks and returns nothing until all is there; this one hands
over each answer when it comes and never waits longer than the deadline. An error that Flower itself reports may carry
the SuperLink's node id and free text of a site (stack.md 3.4): the site is told by the id of the request, and the text
is dropped.

Flower does not deliver a message again that died with its node. A site that was lost with a request on its hands is
therefore asked again as soon as it is back, as long as the round needs it: the request says everything that its answer
depends on, so a second answer is the first one's copy, and only one is taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from common.errors import CODES, FedsgcgError, Problem
from common.wire.messages import Reply, Request, decode_reply, encode_request, payload_bytes

FIRST_PAUSE_S = 0.002
LONGEST_PAUSE_S = 0.1
TTL_MARGIN_S = 60.0
LOOK_S: Final = 2.0
"""Time between two looks at who is there, which cost a request of their own."""

MOST_TRIES: Final = 4
"""Requests to one site in one exchange: one that dies of every request must not be asked for ever."""

LOST: Final = frozenset(
    {
        *(ErrorCode.NODE_UNAVAILABLE, ErrorCode.CLIENT_APP_CRASHED),
        *(ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE),
    }
)
"""Flower's errors that say that a request or its answer was lost, not that the site refused it."""


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
    enough: int | None = None,
    on_answer: OnAnswer = ignore_answer,
) -> list[Answer]:
    """Send one request to several sites and collect their answers.

    Args:
        grid: Flower's grid.
        nodes: Site -> node id of everyone to ask.
        message_type: Flower's message type, e.g. `common.wire.messages.TRAIN`.
        request: The request; encoded once for all.
        deadline_s: Seconds after which a missing answer becomes RND-404.
        enough: Replies with which the exchange ends although sites were lost on the way; None waits until the deadline
            for a lost site to come back. Sites that are there are waited for in any case.
        on_answer: Called with each answer when it comes.

    Returns:
        One answer a site, in the order of the sites' names.
    """
    content = encode_request(request)
    exchanging = _Exchange(grid, nodes, message_type, content, deadline_s, on_answer)
    return exchanging.run(len(nodes) if enough is None else enough)


@dataclass
class _Asked:
    """A site that has been asked and has not answered.

    Attributes:
        node: Its node id.
        request: Id of the latest request, "" while it is lost.
        since: When the node was last activated before that request, "" where the grid does not say.
        tries: Requests so far.
        problem: What was lost, while it is lost.
    """

    node: int
    request: str = ""
    since: str = ""
    tries: int = 0
    problem: Problem | None = None


@dataclass
class _Exchange:
    """The state of one call of `exchange`."""

    grid: Grid
    nodes: Mapping[str, int]
    message_type: str
    content: RecordDict
    deadline_s: float
    on_answer: OnAnswer
    answers: dict[str, Answer] = field(default_factory=dict)
    asked: dict[str, _Asked] = field(default_factory=dict)
    end: float = 0.0
    size: int = 0

    def run(self, enough: int) -> list[Answer]:
        """Ask, collect, ask again; see `exchange`."""
        self.end = time.monotonic() + self.deadline_s
        self.size = sum(payload_bytes(self.content).values())
        present = presence(self.grid)
        for site in sorted(self.nodes):
            self.asked[site] = _Asked(self.nodes[site])
            self._push(site, present)
        looked, pause = time.monotonic(), FIRST_PAUSE_S
        while self.asked and time.monotonic() < self.end:
            news = self._pull()
            if not self.asked or self._only_lost_sites_left(enough):
                break
            if time.monotonic() - looked >= LOOK_S:
                self._ask_again()
                looked = time.monotonic()
            pause = FIRST_PAUSE_S if news else min(1.5 * pause, LONGEST_PAUSE_S)
            time.sleep(min(pause, max(0.0, self.end - time.monotonic())))
        self._pull()
        for site in sorted(self.asked):
            problem = self.asked[site].problem or missing(site, self.message_type, self.deadline_s)
            self._take(site, Answer(site, problem=problem, bytes_down=self.size))
        return [self.answers[site] for site in sorted(self.answers)]

    def _push(self, site: str, present: Mapping[int, str]) -> None:
        """Send the request to a site; a grid that does not take it makes the site a lost one."""
        asked = self.asked[site]
        left_s = max(1.0, self.end - time.monotonic())
        asked.request = push(self.grid, self.content, self.message_type, asked.node, left_s)
        asked.since = present.get(asked.node, "")
        asked.tries += 1
        asked.problem = None if asked.request else missing(site, self.message_type, self.deadline_s)

    def _pull(self) -> bool:
        """Take in what has come; returns whether anything had."""
        waiting = {asked.request: site for site, asked in self.asked.items() if asked.request}
        messages = list(self.grid.pull_messages(sorted(waiting))) if waiting else []
        for message in messages:
            site = waiting.pop(message.metadata.reply_to_message_id, "")
            if site in self.asked:  # a second reply to the same request is ignored
                self._take_message(site, message)
        return bool(messages)

    def _take_message(self, site: str, message: Message) -> None:
        asked = self.asked[site]
        answer = read_answer(message, site, self.size)
        if was_lost(message) and asked.tries < MOST_TRIES:
            asked.request, asked.problem = "", answer.problem
        else:
            self._take(site, answer)

    def _take(self, site: str, answer: Answer) -> None:
        del self.asked[site]
        self.answers[site] = answer
        self.on_answer(answer)

    def _only_lost_sites_left(self, enough: int) -> bool:
        """Whether nobody is at work any more and the round can do without those who were lost."""
        replies = sum(answer.reply is not None for answer in self.answers.values())
        return not any(asked.request for asked in self.asked.values()) and replies >= enough

    def _ask_again(self) -> None:
        """Ask lost sites that are back, and sites that have been restarted since they were asked."""
        present = presence(self.grid)
        for site, asked in self.asked.items():
            again = not asked.request or was_restarted(asked.node, asked.since, present)
            if asked.node in present and asked.tries < MOST_TRIES and again:
                self._push(site, present)


def presence(grid: Grid) -> dict[int, str]:
    """Node id -> when it was last activated, for every node that is there; "" where the grid does not say."""
    return {node.node_id: node.last_activated_at for node in grid.get_nodes()}


def was_restarted(node: int, since: str, present: Mapping[int, str]) -> bool:
    """Whether a node that is there was activated again since; never where the grid does not say when."""
    return bool(since) and present.get(node, since) != since


def push(grid: Grid, content: RecordDict, message_type: str, node: int, deadline_s: float) -> str:
    """Send one message; returns its id, or "" when the grid would not take it (a node that has left)."""
    message = Message(content, node, message_type, ttl=deadline_s + TTL_MARGIN_S)
    identifiers = list(
        grid.push_messages([message])
    )  # one by one: a grid may leave refused ones out of the list
    return (identifiers[0] or "") if identifiers else ""


def was_lost(message: Message) -> bool:
    """Whether Flower says that a request or its answer was lost on the way."""
    return bool(message.has_error() and message.error.code in LOST)


def read_answer(message: Message, site: str, bytes_down: int = 0) -> Answer:
    """Decode a reply; whatever is wrong with it becomes the answer's problem and goes no further."""
    if message.has_error():
        lost = was_lost(message)
        found = (
            f"{'it was lost' if lost else 'its app failed'} (Flower's error {message.error.code})"
        )
        problem = Problem("RND-404" if lost else "SITE-500", where=site, found=found)
        return Answer(site, problem=problem, bytes_down=bytes_down)
    try:
        reply = decode_reply(message.content)
        size = sum(payload_bytes(message.content).values())
        if not isinstance(reply.details, dict):
            raise TypeError("details that are no dictionary")
    except FedsgcgError as error:
        # What was found may quote the site's text; the code says what was wrong.
        return Answer(site, problem=Problem(error.code, where=site), bytes_down=bytes_down)
    except (
        Exception
    ) as error:  # what a decoder raises for hostile bytes is an open list; none may stop the others
        found = f"a reply that cannot be read ({type(error).__name__})"
        return Answer(
            site, problem=Problem("PAY-106", where=site, found=found), bytes_down=bytes_down
        )
    if reply.error:
        known = reply.error in CODES
        problem = Problem(
            reply.error if known else "SITE-500",
            where=site,
            found="" if known else "an unknown error code",
        )
        return Answer(
            site, problem=problem, bytes_down=bytes_down, bytes_up=size, stated=reply.site
        )
    return Answer(site, reply=reply, bytes_down=bytes_down, bytes_up=size)


def missing(site: str, message_type: str, deadline_s: float) -> Problem:
    """The problem of a site that has not answered."""
    found = f"no answer to {message_type!r} within {deadline_s:g} s"
    return Problem(
        "RND-404",
        where=site,
        found=found,
        action="look at the site's own log; it is asked again next round",
    )
