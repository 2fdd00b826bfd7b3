"""One exchange: a request to some sites, and their answers until a deadline.

Flower's `send_and_receive` polls every three seconds and returns only when all answers have
arrived. `exchange` passes on each answer as it arrives and never waits longer than the deadline. An
error that Flower itself reports may carry the SuperLink's node id and free text from a site
(docs/explanation/flower.md, "Behaviour that shaped the code"). The site is therefore identified by
the id of the request, and the text is dropped.

Flower does not redeliver a message that was lost with its node. A site that disconnected while a
request was pending is therefore asked again when it reconnects, as long as the round needs it. The
answer depends on nothing but the request, so a second answer equals the first, and only one is
used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedsgcg.common.errors import CODES, FedsgcgError, Problem
from fedsgcg.common.wire.messages import Reply, Request, decode_reply, encode_request, payload_bytes
from fedsgcg.common.wire.payload import Weights
from fedsgcg.common.wire.sizes import Sizes
from fedsgcg.server.sites.spill import spilled, spilled_values

FIRST_PAUSE_S = 0.002
LONGEST_PAUSE_S = 0.1
TTL_MARGIN_S = 60.0
LOOK_S: Final = 2.0
"""Seconds between two checks for connected nodes; each check is a request to the SuperLink."""

ANY_SIZES: Final = Sizes()
"""Sizes of a reply when no plan says more."""

MOST_TRIES: Final = 4
"""Most requests to one site in one exchange: a site that keeps crashing is not asked forever."""

LOST: Final = frozenset(
    {
        *(ErrorCode.NODE_UNAVAILABLE, ErrorCode.CLIENT_APP_CRASHED),
        *(ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE),
    }
)
"""Flower's errors for a request or an answer that was lost, as opposed to refused by the site."""


@dataclass(frozen=True)
class Answer:
    """The result of a request to one site: a reply or a problem.

    Attributes:
        site: The site that was asked.
        reply: The decoded reply; None when there is a problem.
        problem: Why there is no reply.
        bytes_down: Bytes of the request.
        bytes_up: Bytes of the reply.
        stated: Name stated by a site that replied with an error; not to be shown as it is.
    """

    site: str
    reply: Reply | None = None
    problem: Problem | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    stated: str = ""


OnAnswer = Callable[[Answer], None]


def ignore_answer(answer: Answer) -> None:
    """Ignore an answer; the default of `exchange`."""


def exchange(
    grid: Grid,
    nodes: Mapping[str, int],
    message_type: str,
    request: Request | Mapping[str, Request],
    *,
    deadline_s: float,
    sizes: Sizes = ANY_SIZES,
    folder: Path | None = None,
    enough: int | None = None,
    on_answer: OnAnswer = ignore_answer,
) -> list[Answer]:
    """Send a request to several sites and collect their answers.

    Args:
        grid: Flower's grid.
        nodes: Site -> node id of everyone to ask.
        message_type: Flower's message type, e.g. `common.wire.messages.TRAIN`.
        request: The request, encoded once for all; or one for each site.
        deadline_s: Seconds after which a missing answer becomes RND-404.
        sizes: Sizes that the plan allows a reply.
        folder: Where received models wait (`server.sites.spill`); None keeps them in memory.
        enough: Number of replies after which lost sites are no longer waited for; None waits for
            them until the deadline. Connected sites are always waited for.
        on_answer: Called with each answer as it arrives.

    Returns:
        One answer per site, in the order of the sites' names.
    """
    asked = dict.fromkeys(nodes, request) if isinstance(request, Request) else dict(request)
    encoded = encode_request(request) if isinstance(request, Request) else None
    content = {site: encoded or encode_request(asked[site]) for site in nodes}
    weights = {site: asked[site].weights for site in nodes}
    exchanging = _Exchange(
        grid,
        nodes,
        message_type,
        content,
        weights,
        deadline_s,
        sizes,
        folder,
        on_answer,
    )
    return exchanging.run(len(nodes) if enough is None else enough)


@dataclass
class _Asked:
    """A site that has been asked and has not answered.

    Attributes:
        node: Its node id.
        request: Id of the latest request, "" after it was lost.
        since: Last activation of the node before that request, "" if the grid does not report it.
        tries: Number of requests so far.
        problem: The problem of a lost request.
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
    content: Mapping[str, RecordDict]
    weights: Mapping[str, Weights | None]
    deadline_s: float
    sizes: Sizes
    folder: Path | None
    on_answer: OnAnswer
    answers: dict[str, Answer] = field(default_factory=dict)
    asked: dict[str, _Asked] = field(default_factory=dict)
    end: float = 0.0
    sizes_down: dict[str, int] = field(default_factory=dict)

    def run(self, enough: int) -> list[Answer]:
        """Ask the sites, collect answers and ask lost sites again; see `exchange`."""
        self.end = time.monotonic() + self.deadline_s
        sizes = {id(one): sum(payload_bytes(one).values()) for one in self.content.values()}
        self.sizes_down = {site: sizes[id(one)] for site, one in self.content.items()}
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
            self._take(site, Answer(site, problem=problem, bytes_down=self.sizes_down[site]))
        return [self.answers[site] for site in sorted(self.answers)]

    def _push(self, site: str, present: Mapping[int, str]) -> None:
        """Send the request to a site; if the grid refuses it, the site counts as lost."""
        asked = self.asked[site]
        left_s = max(1.0, self.end - time.monotonic())
        asked.request = push(self.grid, self.content[site], self.message_type, asked.node, left_s)
        asked.since = present.get(asked.node, "")
        asked.tries += 1
        asked.problem = None if asked.request else missing(site, self.message_type, self.deadline_s)

    def _pull(self) -> bool:
        """Process the messages received; returns whether there were any."""
        waiting = {asked.request: site for site, asked in self.asked.items() if asked.request}
        messages = list(self.grid.pull_messages(sorted(waiting))) if waiting else []
        for message in messages:
            site = waiting.pop(message.metadata.reply_to_message_id, "")
            if site in self.asked:  # a second reply to the same request is ignored
                self._take_message(site, message)
        return bool(messages)

    def _take_message(self, site: str, message: Message) -> None:
        asked = self.asked[site]
        down, weights = self.sizes_down[site], self.weights[site]
        answer = self._spilled(read_answer(message, site, self.sizes, down, weights))
        if was_lost(message) and asked.tries < MOST_TRIES:
            asked.request, asked.problem = "", answer.problem
        else:
            self._take(site, answer)

    def _spilled(self, answer: Answer) -> Answer:
        """Return the answer with its model and control variates in files."""
        reply = answer.reply
        if self.folder is None or reply is None or reply.weights is None:
            return answer
        reply = replace(reply, weights=spilled(reply.weights, self.folder))
        if reply.control_variates is not None:
            on_disk = spilled_values(reply.control_variates, self.folder)
            reply = replace(reply, control_variates=on_disk)
        return replace(answer, reply=reply)

    def _take(self, site: str, answer: Answer) -> None:
        del self.asked[site]
        self.answers[site] = answer
        self.on_answer(answer)

    def _only_lost_sites_left(self, enough: int) -> bool:
        """Whether only lost sites have not answered, and the round can do without them."""
        replies = sum(answer.reply is not None for answer in self.answers.values())
        return not any(asked.request for asked in self.asked.values()) and replies >= enough

    def _ask_again(self) -> None:
        """Ask lost sites that have reconnected, and sites that restarted since they were asked."""
        present = presence(self.grid)
        for site, asked in self.asked.items():
            again = not asked.request or was_restarted(asked.node, asked.since, present)
            if asked.node in present and asked.tries < MOST_TRIES and again:
                self._push(site, present)


def presence(grid: Grid) -> dict[int, str]:
    """Node id -> last activation of every connected node; "" if the grid does not report it."""
    return {node.node_id: node.last_activated_at for node in grid.get_nodes()}


def was_restarted(node: int, since: str, present: Mapping[int, str]) -> bool:
    """Whether a connected node was activated again; False if the grid does not report it."""
    return bool(since) and present.get(node, since) != since


def push(grid: Grid, content: RecordDict, message_type: str, node: int, deadline_s: float) -> str:
    """Send one message; returns its id, or "" if the grid refuses it (a node that has left)."""
    message = Message(content, node, message_type, ttl=deadline_s + TTL_MARGIN_S)
    # Messages are sent one by one because a grid may omit refused ones from the list it returns.
    identifiers = list(grid.push_messages([message]))
    return (identifiers[0] or "") if identifiers else ""


def was_lost(message: Message) -> bool:
    """Whether Flower reports that a request or its answer was lost."""
    return bool(message.has_error() and message.error.code in LOST)


def read_answer(
    message: Message,
    site: str,
    sizes: Sizes = ANY_SIZES,
    bytes_down: int = 0,
    weights: Weights | None = None,
) -> Answer:
    """Decode a reply to a request with these weights.

    Any error becomes the answer's problem and is not raised.
    """
    if message.has_error():
        lost = was_lost(message)
        event = "it was lost" if lost else "its app failed"
        found = f"{event} (Flower's error {message.error.code})"
        problem = Problem("RND-404" if lost else "SITE-500", where=site, found=found)
        return Answer(site, problem=problem, bytes_down=bytes_down)
    try:
        reply = decode_reply(message.content, sizes, weights)
        size = sum(payload_bytes(message.content).values())
        if not isinstance(reply.details, dict):
            raise TypeError("details that are no dictionary")
    except FedsgcgError as error:
        # The error's `found` may quote text from the site, so only the code is kept.
        return Answer(site, problem=Problem(error.code, where=site), bytes_down=bytes_down)
    except Exception as error:
        # A decoder may raise any exception for hostile bytes, and none may stop the exchange.
        found = f"a reply that cannot be read ({type(error).__name__})"
        return Answer(
            site, problem=Problem("PAY-106", where=site, found=found), bytes_down=bytes_down
        )
    if reply.error:
        if reply.error in CODES:
            problem = Problem(reply.error, where=site)
        else:
            problem = Problem("SITE-500", where=site, found="an unknown error code")
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
        action="see the site's own log; the site is asked again in the next round",
    )
