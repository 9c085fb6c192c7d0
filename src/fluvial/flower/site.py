"""The site's half: Flower's messages to a `Station` and back."""

import logging
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fluvial.errors import FluvialError
from fluvial.flower.envelope import pack, unpack
from fluvial.payload import Limits
from fluvial.station import Header, SiteFile, Station, read_site_file

logger = logging.getLogger(__name__)


def client_app(find: Callable[[Context], SiteFile]) -> ClientApp:
    """An app that answers for the site that `find` names."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer(find(context), message)

    return app


def answer(site: SiteFile, message: Message) -> Message:
    """The reply to one message; what goes wrong at the site is told in the reply's header."""
    try:
        wire, header = unpack(message, max_bytes=Limits().max_bytes)
        data, error = station(site.model_dump_json()).answer(Header.read(header), wire), ""
    except FluvialError as problem:
        data, error = b"", f"{type(problem).__name__}: {problem}"
    except Exception:
        data, error = b"", traceback.format_exc()[-3000:]
    if error:
        logger.warning("site %s: %s", site.name, error)
    return Message(pack(data, {"error": error}), reply_to=message)


@cache
def station(site: str) -> Station:
    """The station of a site, as JSON, in this process; a new one gives the same answers."""
    return Station(SiteFile.model_validate_json(site))


def _own(context: Context) -> SiteFile:
    return read_site_file(Path(str(context.node_config["site-file"])))


app = client_app(_own)
"""What a SuperNode runs: the site that its configuration names."""
