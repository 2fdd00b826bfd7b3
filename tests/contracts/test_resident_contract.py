"""The private Flower functions that the resident uses exist in the pinned version."""

import inspect

from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    message_from_proto,
    message_to_proto,
)
from flwr.proto.runtime_pb2 import AcquireTaskRequest, AcquireTaskResponse, SendTaskHeartbeatRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.superexec import run_superexec
from flwr.supernode.runtime import run_clientapp

from fedsgcg.deploy.site.resident import ACQUIRE


def test_tasks_are_pulled_and_pushed_by_these_functions():
    parameters = {
        "pull_task_input": ["client"],
        "push_message": ["client", "message", "context"],
        "push_task_output": ["client", "context", "sub_status", "details"],
    }
    for name, expected in parameters.items():
        assert list(inspect.signature(getattr(run_clientapp, name)).parameters) == expected


def test_a_task_is_acquired_with_a_secret_and_a_token_comes_back():
    assert ACQUIRE in run_superexec._SUPEREXEC_AUTH_METHODS
    assert {field.name for field in AcquireTaskResponse.DESCRIPTOR.fields} >= {"task", "token"}
    assert (
        TaskType.CLIENT_APP
        in AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]).supported_task_types
    )
    assert list(SendTaskHeartbeatRequest.DESCRIPTOR.fields) == [], (
        "a heartbeat says nothing but that it comes"
    )
    for name in ("AcquireTask", "SendTaskHeartbeat", "PullTaskInput", "PushTaskOutput"):
        assert callable(getattr(RuntimeHttpClient, name))


def test_messages_and_contexts_travel_as_protobuf():
    for function in (message_to_proto, message_from_proto, context_to_proto, context_from_proto):
        assert len(inspect.signature(function).parameters) == 1


def test_the_resident_starts_without_torch():
    import subprocess
    import sys

    told = subprocess.run(
        [
            sys.executable,
            "-c",
            "import fedsgcg.deploy.site.resident, sys; "
            "print('torch' in sys.modules, 'ray' in sys.modules)",
        ],
        capture_output=True,
        text=True,
    )
    assert told.stdout.split() == ["False", "False"], told.stderr
