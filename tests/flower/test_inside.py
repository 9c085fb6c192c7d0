"""Flower's insides that the executor uses, and messages of a warm client."""

import importlib
import math
import random
import re
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError, pull_objects
from flwr.supercore.task_identity import TaskIdentity

import fluvial.flower.inbox
import fluvial.flower.nodes
from fluvial.errors import ClientError, WireError
from fluvial.federation.line import FLOWER
from fluvial.flower.envelope import SMALL, pack, unpack
from fluvial.flower.executor import OutOfStepError
from fluvial.flower.inbox import pull_complete
from fluvial.flower.site import site_process
from tests.support.site_process import site_file

pytestmark = pytest.mark.flower

INTERNAL = {
    "flwr.app": ("Context", "Message"),
    "flwr.common.constant": ("ErrorCode",),
    "flwr.common.serde": ("context_from_proto",),
    "flwr.proto.message_pb2": ("ConfirmMessageReceivedRequest", "PullObjectRequest"),
    "flwr.proto.node_pb2": ("Node",),
    "flwr.proto.runtime_pb2": (
        "AcquireTaskRequest",
        "PullAppMessagesRequest",
        "PullTaskInputRequest",
    ),
    "flwr.serverapp": ("Grid", "ServerApp"),
    "flwr.supercore.constant": ("TaskType",),
    "flwr.supercore.heartbeat": ("HeartbeatSender", "make_task_heartbeat_fn_http"),
    "flwr.supercore.inflatable.inflatable_object": ("iterate_object_tree",),
    "flwr.supercore.inflatable.inflatable_utils": (
        "ObjectPullError",
        "inflate_object_from_contents",
        "pull_objects",
    ),
    "flwr.supercore.interceptors": ("RuntimeTokenHttpInterceptor", "RuntimeVersionHttpInterceptor"),
    "flwr.supercore.retry": ("make_simple_http_retry_invoker",),
    "flwr.supercore.runtime": ("RuntimeHttpClient",),
    "flwr.supercore.task_identity": ("TaskIdentity",),
    "flwr.superlink.grid": ("http_grid",),
    "flwr.supernode.runtime.run_clientapp": ("push_message", "push_task_output"),
}
"""What three modules take from Flower, most of it from inside; another release may have moved
it."""


def test_flowers_inside_is_where_we_look_for_it() -> None:
    from importlib.metadata import version

    assert version("flwr").startswith("1.41.")
    for module, names in INTERNAL.items():
        for name in names:
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"

    from flwr.common.constant import ErrorCode
    from flwr.supercore.constant import TaskType
    from flwr.supercore.runtime import RuntimeHttpClient

    assert hasattr(TaskType, "CLIENT_APP")
    assert ErrorCode.MESSAGE_UNAVAILABLE == 3
    assert hasattr(RuntimeHttpClient, "AcquireTask")
    assert hasattr(RuntimeHttpClient, "from_server_address")


def test_nothing_else_is_taken_from_flowers_inside() -> None:
    folder = Path(fluvial.flower.inbox.__file__).parent
    found: dict[str, set[str]] = {}
    for name in ("executor", "inbox", "server"):
        for module, names in re.findall(
            r"from (flwr[\w.]*) import ([\w, ]+)", (folder / f"{name}.py").read_text()
        ):
            found.setdefault(module, set()).update(name.strip() for name in names.split(","))

    assert found == {module: set(names) for module, names in INTERNAL.items()}


def test_the_server_asks_for_the_rest_of_an_upload_in_its_own_time() -> None:
    asked: list[float] = []

    def late(_: str) -> bytes:
        asked.append(time.monotonic())
        if asked[-1] - asked[0] < 1.5:
            raise ObjectUnavailableError("late")
        return b"there"

    assert pull_complete(["last"], late) == {"last": b"there"}
    assert asked[-1] - asked[0] < 1.5 + 1.2 * 0.5 + 0.5


def test_a_reply_is_fetched_when_its_last_part_is_there() -> None:
    asked: list[str] = []

    def pull(part: str) -> bytes:
        asked.append(part)
        if asked.count("root") < 3:
            raise ObjectUnavailableError(part)
        return part.encode()

    found = pull_complete(object_ids=["a", "b", "root"], pull_object_fn=pull)  # as Flower calls it
    assert found == {part: part.encode() for part in ("a", "b", "root")}
    assert asked[:3] == ["root"] * 3
    assert sorted(asked[3:]) == ["a", "b"]


def test_replies_whose_last_part_overtook_another_delay_no_site(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fluvial.flower.inbox, "_OBJECT_S", 0.2)
    dead = threading.Event()

    def half(part: str) -> bytes:
        if part == "a" and not dead.wait(0.05):
            raise ObjectUnavailableError(part)
        return b"there"

    stuck = [
        threading.Thread(target=pull_complete, args=(["a", "root"], half), daemon=True)
        for _ in range(4)
    ]
    for thread in stuck:
        thread.start()
    time.sleep(0.5)
    began = time.monotonic()
    assert len(pull_complete(["b", "root"], lambda part: part.encode())) == 2
    assert time.monotonic() - began < 5
    assert all(thread.is_alive() for thread in stuck)
    dead.set()

    for thread in stuck:
        thread.join(10)
        assert not thread.is_alive()


def test_the_server_takes_the_place_of_flowers_pull() -> None:
    from flwr.superlink.grid import http_grid

    assert vars(http_grid)["pull_objects"] is pull_objects  # which the server's process replaces
    assert "pull_objects" in http_grid.HttpGrid.pull_messages.__code__.co_names


@dataclass
class Runtime:
    """What a SuperNode says of one task; the message, and each part of it, is there after so many
    questions."""

    message: Message
    after: float = 1
    lost: bool = False
    asked: dict[str, float] = field(default_factory=dict)
    confirmed: list[str] = field(default_factory=list)

    def PullTaskInput(self, _: Any) -> Any:  # noqa: N802 - Flower's name
        from flwr.app import Context
        from flwr.common.serde import context_to_proto
        from flwr.proto.run_pb2 import Run
        from flwr.proto.runtime_pb2 import PullTaskInputResponse

        context = Context(run_id=7, node_id=3, node_config={}, state=RecordDict(), run_config={})

        return PullTaskInputResponse(
            context=context_to_proto(context), run=Run(run_id=7), task_id=5
        )

    def PullMessages(self, _: Any) -> Any:  # noqa: N802 - Flower's name
        from flwr.app.message import remove_content_from_message
        from flwr.common.serde import message_to_proto
        from flwr.proto.runtime_pb2 import PullAppMessagesResponse
        from flwr.supercore.inflatable.inflatable_object import get_object_tree

        if not self._there("message"):
            return PullAppMessagesResponse()

        bare = message_to_proto(remove_content_from_message(self.message))
        return PullAppMessagesResponse(
            messages_list=[bare], message_object_trees=[get_object_tree(self.message)]
        )

    def PullObject(self, request: Any) -> Any:  # noqa: N802 - Flower's name
        from flwr.proto.message_pb2 import PullObjectResponse
        from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

        assert (request.run_id, request.node.node_id) == (7, 3)
        found = not self.lost
        there = self._there(request.object_id)
        content = (
            get_all_nested_objects(self.message)[request.object_id].deflate()
            if found and there
            else b""
        )

        return PullObjectResponse(
            object_found=found, object_available=found and there, object_content=content
        )

    def ConfirmMessageReceived(self, request: Any) -> None:  # noqa: N802 - Flower's name
        self.confirmed.append(request.message_object_id)

    def _there(self, what: str) -> bool:
        self.asked[what] = self.asked.get(what, 0) + 1
        return self.asked[what] >= self.after


class Waiting:
    """The SuperNode's next task comes after so many questions."""

    def __init__(self, after: float = math.inf) -> None:
        self.after = after
        self.asked = 0

    def AcquireTask(self, _: Any) -> Any:  # noqa: N802 - Flower's name
        from flwr.proto.runtime_pb2 import AcquireTaskResponse

        self.asked += 1
        return AcquireTaskResponse(token="the next" if self.asked > self.after else "")


@pytest.fixture
def coming(monkeypatch: pytest.MonkeyPatch) -> Message:
    from fluvial.flower import executor

    for identity in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, identity, 1)
    monkeypatch.setattr(executor, "POLL_S", 0.001)
    return Message(
        pack(b"payload" * 1000, {"task": "train"}), dst_node_id=3, message_type="train", ttl=60.0
    )


def test_a_message_is_answered_when_all_of_it_is_there(coming: Message) -> None:
    from fluvial.flower.executor import Tasks, pull

    runtime = Runtime(coming, after=2)
    message, context = pull(cast(Any, runtime), Tasks(cast(Any, Waiting())))
    assert unpack(message, max_bytes=10_000) == (b"payload" * 1000, {"task": "train"})
    assert (message.metadata.message_id, context.node_id) == (coming.object_id, 3)
    assert runtime.confirmed == [coming.object_id]
    assert (TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id) == (5, 7, 3)


def test_a_message_that_the_supernode_dropped_gives_way_to_the_next(coming: Message) -> None:
    from fluvial.flower.executor import Tasks, pull

    runtime = Runtime(coming, after=math.inf)
    tasks = Tasks(cast(Any, Waiting(after=20)))

    with pytest.raises(ClientError, match="the SuperNode dropped an incomplete message"):
        pull(cast(Any, runtime), tasks)

    assert runtime.confirmed == []
    assert tasks.next() == "the next"


def test_a_message_that_is_not_awaited_any_more_is_given_up(coming: Message) -> None:
    from fluvial.flower.executor import Tasks, pull

    coming.metadata.ttl = 0.05
    runtime = Runtime(coming, after=math.inf, asked={"message": math.inf})

    with pytest.raises(ClientError, match="the SuperNode dropped an incomplete message"):
        pull(cast(Any, runtime), Tasks(cast(Any, Waiting())))


def test_messages_that_take_long_measure_the_link(
    coming: Message, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages that come in 4 s, and their answers in 30 s of work, which leave in 10 s."""
    from fluvial.flower import executor

    now = [0.0]

    def taking(seconds: float, result: Any) -> Any:
        def done(*_: Any) -> Any:
            now[0] += seconds
            return result

        return done

    site = site_file(tmp_path)
    content = pack(bytes(3 * 10**5), {"task": "train"})
    for name, value in (
        ("time", SimpleNamespace(monotonic=lambda: now[0])),
        ("_client", lambda *_, **__: SimpleNamespace(close=lambda: None)),
        ("_beating", lambda _: nullcontext()),
        ("pull", taking(4.0, (Message(content, reply_to=coming), None))),
        ("respond", taking(30.0, (bytes(10**6), {"error": ""}))),
        ("_hand_over", taking(10.0, None)),
        ("push_task_output", lambda **_: None),
    ):
        monkeypatch.setattr(executor, name, value)
    for _ in range(2):
        executor._task("", "", cast(Any, None), site, resident=True)
    transfers = site_process(site).transfers
    assert (transfers.down_bytes_s, transfers.up_bytes_s) == (3 * 10**5 / 4, 10**6 / 10)


class Outbox:
    """A SuperNode that holds a reply for so many questions before it has sent it."""

    def __init__(self, held: float) -> None:
        self.held = held
        self.asked = 0

    def PullObject(self, request: Any) -> Any:  # noqa: N802 - Flower's name
        from flwr.proto.message_pb2 import PullObjectResponse

        self.asked += 1
        return PullObjectResponse(object_found=self.asked <= self.held)


@pytest.mark.parametrize(
    ("held", "next_task", "error", "given"),
    [
        (3, math.inf, None, 1),
        (0, math.inf, None, 1),
        (math.inf, 0, ClientError, 0),  # which is still in time
        (math.inf, 3, OutOfStepError, 1),
        (2, 2, None, 1),  # sent between two questions, and the next message after it
    ],
)
def test_a_reply_to_a_message_that_was_dropped_is_not_given(
    held: float,
    next_task: float,
    error: type[Exception] | None,
    given: int,
    coming: Message,
    monkeypatch: Any,
) -> None:
    from fluvial.flower import executor

    pushed: list[Message] = []
    monkeypatch.setattr(executor, "push_message", lambda *given: pushed.append(given[1]))
    tasks = executor.Tasks(cast(Any, Waiting(after=next_task)))

    with pytest.raises(error) if error else nullcontext():
        executor._hand_over(cast(Any, Outbox(held)), tasks, coming, cast(Any, None))
    assert len(pushed) == given
    if next_task < math.inf:
        assert tasks.next() == "the next"


def test_a_part_that_the_supernode_lost_is_told(coming: Message) -> None:
    from fluvial.flower.executor import Tasks, pull

    with pytest.raises(ClientError, match="has lost an object of a message"):
        pull(cast(Any, Runtime(coming, lost=True)), Tasks(cast(Any, Waiting())))


def test_the_time_of_a_round_is_predicted_for_this_envelope() -> None:
    assert FLOWER.inline == SMALL


@pytest.mark.parametrize(("size", "objects"), [(0, 3), (SMALL, 3), (SMALL + 1, 6), (2**23, 7)])
def test_a_message_is_as_few_objects_as_its_size_allows(
    size: int, objects: int, coming: Message
) -> None:
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    data = random.Random(1).randbytes(size)
    message = Message(pack(data, {"task": "train"}), dst_node_id=1, message_type="train")
    assert unpack(message, max_bytes=size) == (data, {"task": "train"})
    assert len(get_all_nested_objects(message)) == objects

    with pytest.raises(WireError, match=f"message of {size} bytes exceeds the limit"):
        unpack(message, max_bytes=size - 1)
