"""Answering process of a site, which loads its libraries and base model once and forks for answers.

Stock Flower starts a new Python for each message, which imports torch and loads the model again.
This process runs beside a SuperNode with `--isolation process`, takes its tasks over Flower's
Runtime API, and answers with the installed Fluvial. The app that came with the run is neither
installed nor executed, so a server cannot make a site run code.

The imported names are internal to Flower 1.41; tests/flower/test_inside.py checks each of them.
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
from fluvial.federation.times import to_list
from fluvial.flower import OUT_OF_STEP
from fluvial.flower.envelope import pack, size_of
from fluvial.flower.site import respond, site_process
from fluvial.site_process.site_file import SiteFile

logger = logging.getLogger(__name__)

POLL_S = 0.1
"""Seconds between two requests to the SuperNode, which runs on this machine."""


def serve(runtime_api: str, site: SiteFile, *, parent: int | None = None) -> None:
    """Take and answer tasks until the process `parent`, which started this one, has ended."""
    import peft  # noqa: F401 - every task needs these imports, which happen once
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)  # no thread pool may exist when the process forks
    resident = site.device != "cpu" and torch.cuda.is_available()
    tasks = Tasks(_client(runtime_api, "SuperExec", token=None))
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    # Ctrl-C reaches the whole group of processes; the site's process ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    while parent is None or os.getppid() == parent:
        try:
            token = tasks.next()
        except Exception as error:
            logger.debug("no task: %s", error)  # the SuperNode is starting or ending
            time.sleep(1.0)
            continue

        if not token:
            time.sleep(POLL_S)
            continue

        try:
            _task(runtime_api, token, tasks, site, resident=resident)
        except OutOfStepError:
            logger.warning(
                "site %s: its SuperNode is started again, because it was one message late",
                site.name,
            )
            os._exit(OUT_OF_STEP)
        except ClientError as problem:
            logger.warning("site %s: %s", site.name, problem)
        except Exception:
            logger.exception("site %s: a task has failed", site.name)


class Tasks:
    """Queue of the SuperNode's tasks, each as its token."""

    def __init__(self, client: RuntimeHttpClient) -> None:
        self._client = client
        self._ahead = ""

    def next(self) -> str:
        """Return the token of a task, "" if there is none; the caller must end the task."""
        token = self._ahead or self._acquire()
        self._ahead = ""
        return token

    def another(self) -> bool:
        """Return True if a task is waiting; it is the next one."""
        self._ahead = self._ahead or self._acquire()
        return bool(self._ahead)

    def _acquire(self) -> str:
        task = self._client.AcquireTask(
            AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        )
        return str(task.token)


def _task(runtime_api: str, token: str, tasks: Tasks, site: SiteFile, *, resident: bool) -> None:
    """Pull one message, answer it and push the answer.

    A fork makes the answer, so that a kill, as for its memory, costs one answer only. CUDA must not
    be initialised before a fork; with it, a `resident` process makes the answers itself.
    """
    client = _client(runtime_api, "flwr-clientapp", token=token)
    context = None
    status = "failed"
    details = "the task failed for an unknown reason"
    transfers = site_process(site).transfers

    try:
        with _beating(client):
            began_s = time.monotonic()
            message, context = pull(client, tasks)
            download_s = time.monotonic() - began_s
            transfers.received(size_of(message.content), download_s)
            began_s = time.monotonic()
            if not resident:
                _prepare(site)
            prepare_s = time.monotonic() - began_s

        child = None if resident else _fork(site, message)  # while this process has no other thread
        with _beating(client):
            data, header = (
                _collect(child, site, message.metadata.ttl) if child else respond(site, message)
            )
            if "times" in header:
                more = {"work": prepare_s, "download": download_s}
                header["times"] = [
                    own + further
                    for own, further in zip(header["times"], to_list(more), strict=True)
                ]
            reply = Message(pack(data, header), reply_to=message)
            began_s = time.monotonic()
            _hand_over(client, tasks, reply, context)
            transfers.sent(size_of(reply.content), time.monotonic() - began_s)

        status = "completed"
        details = ""
    finally:
        push_task_output(client=client, context=context, sub_status=status, details=details)
        client.close()


def _prepare(site: SiteFile) -> None:
    try:
        site_process(site).prepare()
    except Exception as error:
        # The fork raises the same error, and its answer to the server holds the reason.
        logger.warning("site %s: %s", site.name, error)


def pull(client: RuntimeHttpClient, tasks: Tasks) -> tuple[Message, Context]:
    """Return the message of a task once it is complete, and Flower's context of it.

    A task begins when the SuperNode begins to receive its message. Flower's own client asks for
    missing objects after 1, 3, 7, 15 s and so on, so that one which arrives in the fourth second
    waits for three more.

    Raises `ClientError` when the rest will not arrive. The SuperNode drops the message of a stopped
    run without a notice. It receives one message at a time, so a drop shows by another waiting
    task, or at the latest by the end of the message's time to live.
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
                "the SuperNode dropped an incomplete message, as when its run was stopped"
            )

        time.sleep(POLL_S)

    while not (pulled := client.PullMessages(PullAppMessagesRequest())).messages_list:
        wait()
    tree = pulled.message_object_trees[0]
    ends = time.monotonic() + pulled.messages_list[0].metadata.ttl
    contents: dict[str, bytes] = {}

    # In reverse, because the objects that arrive last are at the front.
    for node_of_tree in reversed(list(iterate_object_tree(tree))):
        wanted = PullObjectRequest(node=node, run_id=run, object_id=node_of_tree.object_id)
        while not (reply := client.PullObject(wanted)).object_available:
            if not reply.object_found:
                raise ClientError("the SuperNode has lost an object of a message")
            wait()

        contents[node_of_tree.object_id] = reply.object_content

    client.ConfirmMessageReceived(
        ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=tree.object_id)
    )
    message = inflate_object_from_contents(tree.object_id, contents)
    assert isinstance(message, Message)
    vars(message.metadata)["_message_id"] = tree.object_id  # not part of what was sent

    return message, context_from_proto(given.context)


class OutOfStepError(Exception):
    """The SuperNode would send every further reply one message too late."""


def _hand_over(client: RuntimeHttpClient, tasks: Tasks, reply: Message, context: Context) -> None:
    """Push a reply to the SuperNode and wait until it was sent.

    If a run is stopped when its message has just arrived, the SuperNode drops the message without
    a notice and waits for the next one. A reply pushed now would be sent in place of the reply to
    the next message, and that one only after a third message, for which the server waits in vain.
    The SuperNode begins with another message only after the reply to the one before was sent, so a
    waiting task shows that a message was dropped.

    Raises `ClientError` where pushing no reply is still a remedy, and `OutOfStepError` afterwards.
    """
    if tasks.another():
        raise ClientError(
            "the SuperNode dropped a message during its answer, as when its run was stopped"
        )

    wanted = PullObjectRequest(object_id=reply.object_id)
    push_message(client, reply, context)
    while client.PullObject(wanted).object_found:
        if tasks.another() and client.PullObject(wanted).object_found:
            raise OutOfStepError
        time.sleep(POLL_S)


@contextmanager
def _beating(client: RuntimeHttpClient) -> Iterator[None]:
    """Send heartbeats for the task to the SuperNode."""
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()

    try:
        yield
    finally:
        if heartbeat.is_running:
            heartbeat.stop()


def _fork(site: SiteFile, message: Message) -> tuple[int, int]:
    """Start an answer in a child process; return its process id and the pipe for the answer."""
    read_end, write_end = os.pipe()
    child = os.fork()

    if child:
        os.close(write_end)
        return child, read_end

    try:
        import torch

        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # A fork has to renew torch's pool of threads before two loading threads use it at once.
        torch.set_num_threads(1)

        if sys.platform == "linux":  # end this process with its parent
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

        data, header = respond(site, message)
        line = json.dumps(header).encode()
        with os.fdopen(write_end, "wb") as pipe:
            pipe.write(len(line).to_bytes(4, "big") + line)
            pipe.write(data)

        os._exit(0)
    except BaseException:
        logger.exception("site %s", site.name)
    finally:
        os._exit(1)


_PR_SET_PDEATHSIG = 1


def _collect(
    child: tuple[int, int], site: SiteFile, timeout_s: float
) -> tuple[bytes, dict[str, Any]]:
    """Return the answer of a child process, or the reason why there is none.

    After `timeout_s` the server no longer waits, and the child is killed.
    """
    number, pipe = child
    deadline = time.monotonic() + timeout_s
    answer = bytearray()
    late = False

    try:
        while not late:
            late = not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]
            chunk = b"" if late else os.read(pipe, 2**20)
            if not chunk:
                break
            answer += chunk
    finally:
        os.close(pipe)

    if late:
        os.kill(number, signal.SIGKILL)

    code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    if code == 0:
        size = 4 + int.from_bytes(answer[:4], "big")
        return bytes(answer[size:]), json.loads(answer[4:size])

    end = f"code {code}"
    if code < 0:
        end = f"signal {-code}; if no user sent it, the machine's memory was too small"
    text = f"the process that answered ended with {end}"
    if late:
        text = f"no answer within {timeout_s:g} s, ended"

    return b"", {"error": site_process(site).refusal(None, RefusalError(text))}


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
