"""A warm client: libraries and base model are loaded once, and a fork of that process makes each
answer.

Stock Flower starts a new Python for each message, which imports torch and loads the model again.
This stands beside a SuperNode of `--isolation process`, takes its tasks over Flower's Runtime API,
and answers with the installed Fluvial. The app that came with the run is never installed nor
executed, so a server cannot make a site run code.

The names below are internal to Flower 1.41; tests/flower/test_flower.py names each of them.
"""

import ctypes
import json
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.common.serde import context_from_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullAppMessagesRequest, PullTaskInputRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output

from fluvial.errors import ClientError, RefusalError
from fluvial.flower import OUT_OF_STEP
from fluvial.flower.envelope import pack
from fluvial.flower.site import respond, station
from fluvial.site_process.site_file import SiteFile

logger = logging.getLogger(__name__)

POLL_S = 0.1
"""Between two questions to the SuperNode, which is on this machine, for a task or for a part of a
message."""


def serve(runtime_api: str, site: SiteFile, *, parent: int | None = None) -> None:
    """Take tasks until the process `parent` (the SuperNode) is gone."""
    import peft  # noqa: F401 - what every task needs is imported once
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)  # no thread pool may exist when the process forks
    resident = site.device != "cpu" and torch.cuda.is_available()
    tasks = Tasks(_client(runtime_api, "SuperExec", token=None))
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the site's process ends this one

    while parent is None or os.getppid() == parent or Path(f"/proc/{parent}").exists():
        try:
            token = tasks.next()
        except Exception as error:
            logger.debug("no task: %s", error)  # the SuperNode is starting, or going
            time.sleep(1.0)
            continue

        if not token:
            time.sleep(POLL_S)
            continue

        try:
            _task(runtime_api, token, tasks, site, resident=resident)
        except OutOfStepError:
            logger.warning(
                "site %s: its SuperNode is started again, because it was out of step", site.name
            )
            os._exit(OUT_OF_STEP)
        except ClientError as problem:
            logger.warning("site %s: %s", site.name, problem)
        except Exception:
            logger.exception("site %s: a task came to nothing", site.name)


class Tasks:
    """The SuperNode's tasks in turn, each as the token that stands for it."""

    def __init__(self, client: RuntimeHttpClient) -> None:
        self._client = client
        self._ahead = ""

    def next(self) -> str:
        """A task, "" if there is none; whoever has it must end it."""
        token = self._ahead or self._acquire()
        self._ahead = ""
        return token

    def another(self) -> bool:
        """Whether one is waiting; it comes next."""
        self._ahead = self._ahead or self._acquire()
        return bool(self._ahead)

    def _acquire(self) -> str:
        found = self._client.AcquireTask(
            AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        )
        return str(found.token)


def _task(runtime_api: str, token: str, tasks: Tasks, site: SiteFile, *, resident: bool) -> None:
    """Pull one message, answer it, push the answer; a `resident` process makes the answer itself.

    CUDA must not be initialised before a fork. Without it, a fork that is killed, as for its
    memory, costs one answer: this process lives on and says so.
    """
    client = _client(runtime_api, "flwr-clientapp", token=token)
    context = None
    status = "failed"
    details = "the task failed for an unknown reason"

    try:
        with _beating(client):
            message, context = pull(client, tasks)
            if not resident:
                _prepare(site)

        child = None if resident else _fork(site, message)  # while this process has no other thread
        with _beating(client):
            data, header = (
                _collect(child, site, message.metadata.ttl) if child else respond(site, message)
            )
            _hand_over(client, tasks, Message(pack(data, header), reply_to=message), context)

        status = "completed"
        details = ""
    finally:
        push_task_output(client=client, context=context, sub_status=status, details=details)
        client.close()


def _prepare(site: SiteFile) -> None:
    try:
        station(site).prepare()
    except Exception as error:
        logger.warning(
            "site %s: %s", site.name, error
        )  # the fork meets it too, and tells the server


def pull(client: RuntimeHttpClient, tasks: Tasks) -> tuple[Message, Context]:
    """The message of a task as soon as all of it is there, and what Flower keeps beside it.

    There is a task as soon as the SuperNode begins to receive its message. Flower's own client asks
    for what is missing after 1, 3, 7, 15 s and so on, so what comes in the fourth second waits for
    three more.

    Raises `ClientError` when the rest will not come. The SuperNode drops the message of a run that
    was stopped, and tells nobody; but it receives one at a time, so another task says it, or else
    the end of the time it was sent for.
    """
    given = client.PullTaskInput(PullTaskInputRequest())
    run = given.run.run_id
    node = Node(node_id=given.context.node_id)
    TaskIdentity.task_id = given.task_id
    TaskIdentity.run_id = run
    TaskIdentity.node_id = node.node_id
    ends = float("inf")

    def wait() -> None:
        if tasks.another() or time.monotonic() > ends:
            raise ClientError(
                "the SuperNode dropped a message before all of it was here, as when its run was stopped"
            )

        time.sleep(POLL_S)

    while not (found := client.PullMessages(PullAppMessagesRequest())).messages_list:
        wait()
    tree = found.message_object_trees[0]
    ends = time.monotonic() + found.messages_list[0].metadata.ttl
    parts: dict[str, bytes] = {}

    for each in reversed(list(iterate_object_tree(tree))):  # what comes last is asked for first
        wanted = PullObjectRequest(node=node, run_id=run, object_id=each.object_id)
        while not (part := client.PullObject(wanted)).object_available:
            if not part.object_found:
                raise ClientError("the SuperNode has lost a part of a message")
            wait()

        parts[each.object_id] = part.object_content

    client.ConfirmMessageReceived(
        ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=tree.object_id)
    )
    message = inflate_object_from_contents(tree.object_id, parts)
    assert isinstance(message, Message)
    vars(message.metadata)["_message_id"] = tree.object_id  # not part of what was sent

    return message, context_from_proto(given.context)


class OutOfStepError(Exception):
    """The SuperNode will send every further reply one message too late."""


def _hand_over(client: RuntimeHttpClient, tasks: Tasks, reply: Message, context: Context) -> None:
    """Give a reply to the SuperNode and wait until it was sent.

    Where a run is stopped just when its message has come down, the SuperNode drops the message,
    without a word, and looks for the next one. A reply to the first, given to it now, would be sent
    in the place of the reply to the next; and that one not before there is a third message, for
    which the server waits in vain. It begins with another message only when it has sent the reply
    to the one before. So a task that is waiting tells of a message that was dropped. Raises
    `ClientError` while it can be mended by giving no reply, and `OutOfStepError` afterwards.
    """
    if tasks.another():
        raise ClientError(
            "the SuperNode dropped a message while it was answered, as when its run was stopped"
        )

    wanted = PullObjectRequest(object_id=reply.object_id)
    push_message(client, reply, context)
    while client.PullObject(wanted).object_found:
        if tasks.another() and client.PullObject(wanted).object_found:
            raise OutOfStepError
        time.sleep(POLL_S)


@contextmanager
def _beating(client: RuntimeHttpClient) -> Iterator[None]:
    """Tell the SuperNode now and then that its task is being worked on."""
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()

    try:
        yield
    finally:
        if heartbeat.is_running:
            heartbeat.stop()


def _fork(site: SiteFile, message: Message) -> tuple[int, int]:
    """Begin an answer in a child; its process id, and the pipe that the answer comes through."""
    ours, theirs = os.pipe()
    child = os.fork()

    if child:
        os.close(theirs)
        return child, ours

    try:
        import torch

        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(
            1
        )  # renews torch's thread pool; two loading threads at once would find it half renewed

        if sys.platform == "linux":  # a site that was ended does not go on in the background
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

        data, header = respond(site, message)
        line = json.dumps(header).encode()
        with os.fdopen(theirs, "wb") as pipe:
            pipe.write(len(line).to_bytes(4, "big") + line)
            pipe.write(data)

        os._exit(0)
    except BaseException:
        logger.exception("site %s", site.name)
    finally:
        os._exit(1)


_PR_SET_PDEATHSIG = 1


def _collect(
    child: tuple[int, int], site: SiteFile, seconds: float
) -> tuple[bytes, dict[str, Any]]:
    """The answer of a child, or what ended it; after `seconds` nobody waits any more, and it is
    ended here."""
    number, pipe = child
    until = time.monotonic() + seconds
    found = bytearray()
    late = False

    try:
        while not late:
            late = not select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]
            chunk = b"" if late else os.read(pipe, 2**20)
            if not chunk:
                break
            found += chunk
    finally:
        os.close(pipe)

    if late:
        os.kill(number, signal.SIGKILL)

    code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    if code == 0:
        size = 4 + int.from_bytes(found[:4], "big")
        return bytes(found[size:]), json.loads(found[4:size])

    why = (
        f"signal {-code}; if nobody sent it, the machine's memory was too small"
        if code < 0
        else f"code {code}"
    )
    text = (
        f"no answer within {seconds:g} s, ended"
        if late
        else f"the process that answered ended with {why}"
    )
    return b"", {"error": station(site).refusal(None, RefusalError(text))}


def _client(runtime_api: str, component: str, *, token: str | None) -> RuntimeHttpClient:
    interceptors = [RuntimeVersionHttpInterceptor(component_name=component)]
    if token is not None:
        interceptors.append(RuntimeTokenHttpInterceptor(token))

    return RuntimeHttpClient.from_server_address(
        server_address=runtime_api,
        insecure=True,  # loopback only
        root_certificates=None,
        interceptors=interceptors,
        retry_invoker=make_simple_http_retry_invoker(),
    )
