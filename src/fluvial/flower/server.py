"""The server's half of a deployment, which Flower's SuperLink starts for a submitted run."""

import logging
import os
import threading
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import http_grid
from rich.text import Text

from fluvial.data import IGNORE_INDEX, Example, SiteData, SiteTexts
from fluvial.errors import ConfigError, FluvialError
from fluvial.federation.fleet import Fleet
from fluvial.flower import names
from fluvial.flower.inbox import pull_complete
from fluvial.flower.server_operator import read_submission, stream_place
from fluvial.flower.stream.listener import StreamListener
from fluvial.flower.transport import flower_fleet
from fluvial.methods import METHODS
from fluvial.models.encoding import Encoder
from fluvial.models.pool import ModelPool
from fluvial.report.live import with_page
from fluvial.report.round_lines import round_line, setup_lines
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.run import execute

logger = logging.getLogger(__name__)

app = ServerApp()
"""Server app that the SuperLink runs."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configuration that was submitted, in the folder that the server's operator chose."""
    begin_log()
    _end_with_parent()
    vars(http_grid)["pull_objects"] = pull_complete
    server, given = read_submission(str(context.run_config["submitted"]))
    config = parse(given["config"], "the submitted configuration")
    folder = Path(given["folder"])

    def registered() -> dict[int, str]:
        return {
            int(number): name
            for number, name in names.read(server / names.FILE)["sites"].items()
            if number.isdigit()
        }

    def assemble(each: RunConfig, _: object, pool: ModelPool, texts: Any) -> Fleet:
        if config.compare and not each.compare:
            logger.info(
                "sites are asked to take part in %r, a baseline of compare", each.method.name
            )
        return flower_fleet(
            grid,
            each,
            folder.name,
            texts.names,
            pool,
            registered=registered,
            listener=listener,
            keys=None if place.certificate is None else server,
        )

    def texts(config: RunConfig, pool: ModelPool) -> ServerTexts:
        return ServerTexts(config, pool)

    place = stream_place(server)
    with StreamListener(place) as listener:
        events = execute(
            config, folder, resume=bool(given["resume"]), assemble=assemble, texts=texts
        )
        for event in with_page(events, config, folder):
            if event.kind == "round":
                logger.info("%s", _plain(round_line(event.values)))
            elif event.kind == "setup":
                for line in setup_lines(event.values):
                    logger.info("%s", _plain(line))
            else:
                logger.info("%s: %s", event.method, event.values["verdict"]["line"])


def begin_log() -> None:
    """Log what this process says, each line once, and an error of ours as one line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # httpx would log every request of Flower's, and each line would be sent by a request.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    flower = logging.getLogger("flwr")
    flower.propagate = False  # it has a handler of its own
    flower.addFilter(ErrorInOneLine())


class ErrorInOneLine(logging.Filter):
    """Filter of Flower's log, which has a traceback of every error that ends a run.

    An error of Fluvial's tree says what is wrong, so its message alone remains, and what Flower
    adds about its own exit code goes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._told = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Return False for a line that is left out, and shorten that of an error of ours."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, FluvialError):
            record.msg = "%s: %s"
            record.args = (type(error).__name__, error)
            record.exc_info = None
            self._told = True
            return True

        return not (self._told and record.getMessage().startswith("Exit Code:"))


def _end_with_parent() -> None:
    """End this process, and with it its lock on the run's folder, when its parent process ends.

    Flower checks too, but counts a parent that has ended and was not waited for, as in a container,
    as alive.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        logger.error("the server that started this run has gone; the run can be resumed")
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class ServerTexts:
    """Data as the server knows it: the names of its sites, public text, and a prompt."""

    def __init__(self, config: RunConfig, pool: ModelPool) -> None:
        self.config = config
        self.pool = pool
        methods = (config.method.name, *config.compare)
        if any(METHODS[name].traits.pooled for name in methods):
            raise ConfigError(
                "the central baseline needs all data at one place; remove it from compare"
            )

    @cached_property
    def names(self) -> Sequence[str]:
        """Names of `fleet.sites`, or of the sites in data that is the same everywhere."""
        if self.config.fleet.sites:
            return tuple(sorted(self.config.fleet.sites))
        return self._texts.names

    @cached_property
    def _texts(self) -> SiteTexts:
        return SiteTexts(self.config.data, self.pool.tokenizer, seed=self.config.seed)

    def public(self) -> dict[str, list[Example]]:
        """Return the public records; see `Texts`."""
        return self._texts.public()

    sample_from: Literal["site", "public"] | None = None
    """The sample is a prompt of the configuration, or a fixed one."""

    def sample(self) -> SiteData:
        """Return the configured prompt as a sample, since the server holds no text of the sites."""
        prompt = self.config.evaluate.sample_prompt or "Once upon a time"
        ids = Encoder.of(self.pool.tokenizer).prompt(prompt)
        example = Example(ids, [IGNORE_INDEX, *ids[1:]])
        return SiteData([example], [example], [], 1, 0, 0)


def _plain(line: str) -> str:
    """Return a line with rich markup as it reads in a log."""
    return Text.from_markup(line).plain
