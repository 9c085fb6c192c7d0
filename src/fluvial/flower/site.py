"""The site's half of a deployment, which turns Flower's messages into those of a `SiteProcess`."""

import logging
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fluvial.errors import ConfigError, PrivacyError, RefusalError
from fluvial.federation.times import to_list
from fluvial.flower.channel_keys import site_end
from fluvial.flower.envelope import pack, unpack
from fluvial.flower.programs import split_address
from fluvial.flower.stream.caller import StreamCaller
from fluvial.flower.stream.invitation import Invitation
from fluvial.flower.stream.seal import SiteSeal, terms_of
from fluvial.site_process.journal import Header
from fluvial.site_process.process import SiteProcess
from fluvial.site_process.site_file import SiteFile, read_site_file
from fluvial.wire.payload import Limits

logger = logging.getLogger(__name__)


def client_app(find: Callable[[Context], SiteFile]) -> ClientApp:
    """Return an app that answers for the site whose settings `find` returns."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            site = find(context)
        except Exception:  # Flower would send the text of the error
            logger.exception("the site's file cannot be read")
            return Message(
                pack(b"", {"error": "the site's own file cannot be read"}), reply_to=message
            )

        return answer(site, message)

    return app


def answer(site: SiteFile, message: Message) -> Message:
    """Return the reply to one message."""
    return Message(pack(*respond(site, message)), reply_to=message)


def respond(site: SiteFile, message: Message) -> tuple[bytes, dict[str, Any]]:
    """Return payload and header of the reply to one message; the header holds an error, if any."""
    here = site_process(site)
    header = None
    began_s = time.perf_counter()

    try:
        wire, values = unpack(message, max_bytes=Limits().max_bytes)
        header = Header.read(values)
        invitation = Invitation.read(values)
        if invitation is None:
            answer = here.answer(header, wire)
        else:
            with caller(site, invitation, header.run) as stream:
                answer = here.answer(header, wire, stream)
    except Exception as problem:
        error = here.refusal(header, problem)
        logger.warning("site %s: %s", site.name, error)
        return b"", {"error": error, "refuses": isinstance(problem, ConfigError | PrivacyError)}

    told: dict[str, Any] = {"error": "", "kept": answer.kept}
    if answer.times is not None:
        work_s = time.perf_counter() - began_s - answer.times.get("waiting", 0.0)
        told["times"] = to_list({**answer.times, "work": work_s})
    return answer.data, told


def caller(site: SiteFile, invitation: Invitation, run: str) -> StreamCaller:
    """Return the site's end of a conversation, which connects with its first turn.

    Raises `ConfigError` for an address in the site's file that is none, and for a channel for which
    the file lacks a key. A site that has pinned a server's key refuses turns that are not sealed.
    """
    seal = None
    if invitation.sealed:
        seal = SiteSeal(site_end(site, terms_of(run, invitation.token)))
    elif site.server_fingerprint is not None:
        raise RefusalError(
            "the server does not seal its turns, and this site's file pins the key of a server "
            "that does; ask the server's operator"
        )

    host, _ = split_address(site.server)
    port = invitation.port
    if site.stream is not None:
        host, port = split_address(site.stream)

    authority = None if site.ca is None else site.ca.read_bytes()
    return StreamCaller(invitation, host, port, authority=authority, seal=seal)


def site_process(site: SiteFile) -> SiteProcess:
    """Return the site's process, made once in this system process; a new one answers the same."""
    return _site_process(site.model_dump_json(exclude_unset=True))


@cache
def _site_process(site: str) -> SiteProcess:
    return SiteProcess(SiteFile.model_validate_json(site))


def _own(context: Context) -> SiteFile:
    return read_site_file(Path(str(context.node_config["site-file"])))


app = client_app(_own)
"""Client app that a SuperNode runs, for the site that the SuperNode's configuration names."""
