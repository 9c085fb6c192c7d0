"""A warm client: libraries and base model are loaded once, and every Flower task gets a fork of that process.

Stock Flower starts a new Python for each message, which imports torch and loads the model again. This stands beside a
SuperNode of `--isolation process`, takes its tasks over Flower's Runtime API, and answers with the installed Fluvial.
The app that came with the run is never installed nor executed, so a server cannot make a site run code.

The names below are internal to Flower 1.41; tests/test_flower.py names each of them.
"""

import logging
import os
import signal
import time
from pathlib import Path

from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from fluvial.flower.site import answer, station
from fluvial.station import SiteFile

logger = logging.getLogger(__name__)


def serve(runtime_api: str, site: SiteFile, *, parent: int | None = None, poll_s: float = 0.1) -> None:
    """Take tasks until the process `parent` (the SuperNode) is gone."""
    import peft  # noqa: F401 - what every task needs is imported once
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)  # no thread pool may exist when the process forks
    resident = site.device != "cpu" and torch.cuda.is_available()
    client = _client(runtime_api, "SuperExec", token=None)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the site's process ends this one
    while parent is None or os.getppid() == parent or Path(f"/proc/{parent}").exists():
        try:
            found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        except Exception as error:
            logger.debug("no task: %s", error)  # the SuperNode is starting, or going
            time.sleep(1.0)
            continue
        if found.HasField("task") and found.token:
            if resident:  # CUDA must not be initialised before a fork, so this process answers itself
                _task(runtime_api, found.token, site)
            else:
                station(site.model_dump_json()).prepare()
                _forked(runtime_api, found.token, site)
            continue
        time.sleep(poll_s)


def _forked(runtime_api: str, token: str, site: SiteFile) -> None:
    """Do one task in a child; a SuperNode has one task at a time, so this waits."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _task(runtime_api, token, site)
            code = 0
        except BaseException:
            logger.exception("task failed")
        finally:
            os._exit(code)
    os.waitpid(child, 0)


def _task(runtime_api: str, token: str, site: SiteFile) -> None:
    """Pull one message, answer it, push the answer."""
    client = _client(runtime_api, "flwr-clientapp", token=token)
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    context = None
    status, details = "failed", "the task failed for an unknown reason"
    try:
        message, context, _, _ = pull_task_input(client)
        push_message(client, answer(site, message), context)
        status, details = "completed", ""
    finally:
        push_task_output(client=client, context=context, sub_status=status, details=details)
        heartbeat.stop()
        client.close()


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
