"""What a registered hospital may have stored at the SuperLink, in Flower's own application."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest, PushObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.task_identity import TaskIdentity
from starlette.testclient import TestClient

from fedsgcg.deploy.coordinator.store_limit import StoreLimits
from fedsgcg.deploy.coordinator.superlink import ServerOptions, superlink_app
from tests.faults.test_public_port import KEY, PUBLIC, signature

LIMITS = StoreLimits(size=300_000, objects=12)
SIZE = 100_000


@dataclass
class Link:
    """The SuperLink with a running run and one registered hospital."""

    client: TestClient
    state: Any
    run: int
    node: int

    def request(self) -> Message:
        """A message of the run to the hospital."""
        message = Message(RecordDict(), self.node, "train", ttl=600.0)
        message.metadata.__dict__["_message_id"] = message.object_id
        assert self.state.store_message_ins(message)
        return message

    def reply(self, size: int = SIZE, parts: int = 1, fill: bytes = b"x") -> Message:
        """A reply of the hospital to a new request, with some bytes in each of its parts."""
        content = {
            f"part{k}": ConfigRecord({"data": fill + b"%d" % k + bytes(size)}) for k in range(parts)
        }
        reply = Message(RecordDict(content), reply_to=self.request())
        reply.metadata.__dict__["_message_id"] = reply.object_id
        return reply

    def announce(self, reply: Message, tree: ObjectTree | None = None) -> tuple[int, str]:
        """Push a reply; returns the status and the session."""
        message = remove_content_from_message(reply)
        asked = PushMessagesRequest(
            node=Node(node_id=self.node),
            messages_list=[message_to_proto(message)],
            message_object_trees=[tree or get_object_tree(reply)],
        )
        status, data = self.post("push-messages", asked)
        return status, PushMessagesResponse.FromString(data).session_id if status == 200 else ""

    def push(self, reply: Message, session: str) -> set[int]:
        """Push all objects of a reply; returns the statuses."""
        found = set()
        for name, part in get_all_nested_objects(reply).items():
            asked = PushObjectRequest(
                node=Node(node_id=self.node),
                run_id=self.run,
                object_id=name,
                object_content=part.deflate(),
                session_id=session,
            )
            status, data = self.post("push-object", asked)
            found.add(status)
            if status == 200:
                assert PushObjectResponse.FromString(data).stored
        return found

    def post(
        self, name: str, asked: Any, key: ec.EllipticCurvePrivateKey = KEY
    ) -> tuple[int, bytes]:
        """Send a request, signed by the hospital; returns the status and the answer."""
        kinds = {"content-type": PROTOBUF_MEDIA_TYPE, "accept": PROTOBUF_MEDIA_TYPE}
        answer = self.client.post(
            f"/v1/fleet/{name}",
            content=asked.SerializeToString(),
            headers={**kinds, **signature(key)},
        )
        return answer.status_code, answer.content

    def stored(self) -> tuple[int, int]:
        """Bytes and number of all stored objects."""
        from flwr.supercore.state.schema.objectstore_models import StoredObject
        from sqlalchemy import func, select

        with self.state.object_store.session() as session:
            size = func.coalesce(func.sum(func.length(StoredObject.content)), 0)
            return tuple(session.execute(select(size, func.count())).one())


@pytest.fixture
def link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Link:
    (tmp_path / "secret").write_bytes(b"s" * 32)
    options = ServerOptions(
        host="127.0.0.1",
        port=0,
        control_port=1,
        ca=None,
        certificate=tmp_path,
        key=tmp_path,
        token="t",
        executor_secret=tmp_path / "secret",
        database=tmp_path / "superlink.db",
        log=tmp_path / "log",
        store=LIMITS,
    )
    app = superlink_app(options)
    state = app.state.linkstate_factory.state()
    node = state.create_node("a", "a", PUBLIC, 30.0)
    assert state.activate_node(node, 30.0)
    run = state.create_run(
        "fedsgcg/fedsgcg", "1", "0" * 64, {}, NOOP_FEDERATION_ID, None, "a", TaskType.SERVER_APP
    )
    task = state.get_run_info(run_ids=[run])[0].primary_task_id
    assert state.claim_task(task)
    assert state.activate_task(task)
    identity = {"task_id": task, "run_id": run, "node_id": SUPERLINK_NODE_ID}
    for name, value in identity.items():
        monkeypatch.setattr(TaskIdentity, f"_{name}", value)
    return Link(TestClient(app), state, run, node)


def test_an_honest_reply_is_stored(link: Link) -> None:
    reply = link.reply(parts=2)
    status, session = link.announce(reply)
    assert status == 200
    assert link.push(reply, session) == {200}
    assert link.stored()[0] > 2 * SIZE


@pytest.mark.attack("stored-replies")
def test_row_40_replies_that_nobody_reads_do_not_fill_the_disk(link: Link) -> None:
    """Row 40: late replies stayed until the run ended, whatever their number."""
    for number in range(10):
        reply = link.reply(fill=b"%d" % number)
        status, session = link.announce(reply)
        assert (status, link.push(reply, session)) == (200, {200})
        size, count = link.stored()
        assert size <= LIMITS.size
        assert count <= LIMITS.objects
        assert reply.object_id in link.state.object_store  # the newest is kept


def test_row_40_a_reply_beyond_the_limits_is_refused(link: Link) -> None:
    """Row 40: one reply had as many objects, of 128 MiB each, as its sender liked."""
    large = link.reply(parts=5)
    status, session = link.announce(large)
    assert status == 200
    assert link.push(large, session) == {200, 413}
    assert link.stored()[0] <= LIMITS.size
    many = link.reply(size=1, parts=LIMITS.objects)
    assert link.announce(many) == (413, "")
    assert link.stored()[1] <= 2 * LIMITS.objects


@pytest.mark.attack("stored-replies")
def test_row_40_a_reply_cannot_be_sent_again_with_other_objects(link: Link) -> None:
    """Row 40: the same reply came with another tree each time, and all were registered."""
    reply = link.reply()
    other = get_object_tree(link.reply(fill=b"y"))
    assert link.announce(reply)[0] == 200
    before = link.stored()
    assert link.announce(reply)[0] == 200  # a retry after a lost answer
    assert link.announce(reply, other) == (413, "")
    more = ObjectTree(object_id=reply.object_id, children=[*other.children])
    assert link.announce(reply, more) == (413, "")
    assert link.stored() == before


def test_row_40_only_announced_objects_are_stored(link: Link) -> None:
    reply = link.reply()
    assert link.push(reply, "") == {413}
    _, session = link.announce(reply)
    stranger = replace(link, node=link.node + 1)
    assert stranger.push(reply, session) == {401}  # Flower knows whose signature it is
