"""The site's half: Flower's messages to a `Station` and back."""

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fluvial.flower.envelope import pack, unpack
from fluvial.site_process.journal import Header
from fluvial.site_process.site_file import SiteFile, read_site_file
from fluvial.site_process.station import Station
from fluvial.wire.payload import Limits

logger = logging.getLogger(__name__)


def client_app(find: Callable[[Context], SiteFile]) -> ClientApp:
    """An app that answers for the site that `find` names."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            site = find(context)
        except Exception:  # Flower would send its text
            logger.exception("the site's file cannot be read")
            return Message(
                pack(b"", {"error": "the site's own file cannot be read"}), reply_to=message
            )

        return answer(site, message)

    return app


def answer(site: SiteFile, message: Message) -> Message:
    """The reply to one message."""
    return Message(pack(*respond(site, message)), reply_to=message)


def respond(site: SiteFile, message: Message) -> tuple[bytes, dict[str, Any]]:
    """Payload and header of the reply to one message; what goes wrong at the site is told in the
    header."""
    here = station(site)
    header = None

    try:
        wire, values = unpack(message, max_bytes=Limits().max_bytes)
        header = Header.read(values)
        answer = here.answer(header, wire)
    except Exception as problem:
        error = here.refusal(header, problem)
        logger.warning("site %s: %s", site.name, error)
        return b"", {"error": error}

    return answer.data, {"error": "", "kept": answer.kept}


def station(site: SiteFile) -> Station:
    """The station of a site in this process; a new one gives the same answers."""
    return _station(site.model_dump_json())


@cache
def _station(site: str) -> Station:
    return Station(SiteFile.model_validate_json(site))


def _own(context: Context) -> SiteFile:
    return read_site_file(Path(str(context.node_config["site-file"])))


app = client_app(_own)
"""What a SuperNode runs: the site that its configuration names."""
