"""Runs over Flower's simulation, whose sites are Ray actors on this machine."""

import logging
import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

from fluvial import caller
from fluvial.data import POOLED
from fluvial.errors import ConfigError
from fluvial.federation.fleet import Fleet
from fluvial.federation.in_process import concurrency
from fluvial.flower import QUIET
from fluvial.methods.measuring import Texts
from fluvial.models.pool import ModelPool
from fluvial.runs.config import RunConfig
from fluvial.runs.run import Event, execute

# The second of Ray's variables chooses its coming default, about which it warns otherwise.
_QUIET = QUIET | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Environment of the simulation without telemetry and warnings."""
_Events = queue.SimpleQueue[Event | BaseException | None]


def simulate(config: RunConfig, folder: Path, *, resume: bool = False) -> Iterator[Event]:
    """Run a configuration over Flower's simulation, with the events and weights of `execute`.

    Raises `ConfigError` if Flower is not installed.
    """
    os.environ.update(_QUIET)
    try:
        from flwr.app import Context
        from flwr.serverapp import Grid, ServerApp
        from flwr.simulation import run_simulation
    except ImportError as error:
        raise ConfigError(
            f"{caller.argument('fleet', 'flower')}: {error.name} is not installed; run "
            "pip install 'fluvial[flower]'"
        ) from error

    for name in ("flwr", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from fluvial.flower.site import client_app
    from fluvial.flower.stream.listener import StreamListener
    from fluvial.flower.transport import flower_fleet
    from fluvial.site_process.site_file import Allowed, SiteFile

    names = _site_names(config)
    events: _Events = queue.SimpleQueue()
    left = threading.Event()
    """Set when the caller has closed this generator; the run then ends with its round, because the
    process ends only after its threads."""
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001
        def assemble(each: RunConfig, _: object, pool: ModelPool, texts: Texts) -> Fleet:
            names = (POOLED,) if each.entry.traits.pooled else texts.names
            # Every site is there; the first answer takes as long as the libraries take to load.
            return flower_fleet(
                grid,
                each,
                folder.name,
                names,
                pool,
                simulated=True,
                join_timeout_s=600.0,
                listener=listener,
            )

        try:
            with StreamListener() as listener:
                for event in execute(config, folder, resume=resume, assemble=assemble):
                    events.put(event)
                    if left.is_set():
                        break
        except BaseException as error:
            events.put(error)

        events.put(None)

    def find(context: Context) -> SiteFile:
        name = names[int(context.node_config["partition-id"])]
        allow = Allowed(run_paths=("*",))  # one machine, whose user owns all its files
        return SiteFile(
            name=name,
            folder=folder / "site_processes" / name,
            device=config.model.device,
            allow=allow,
        )

    runner = threading.Thread(
        target=run_simulation,
        kwargs={
            "server_app": server,
            "client_app": client_app(find),
            "num_supernodes": len(names),
            "backend_config": _backend(config, len(names)),
        },
        daemon=True,
    )
    runner.start()

    try:
        yield from _arriving(events, runner)
    finally:
        left.set()

    runner.join(timeout=60)


def _backend(config: RunConfig, sites: int) -> dict[str, dict[str, float]]:
    """Return the settings of Ray: as many sites at a time as the run would train together."""
    workers = concurrency(config.fleet)
    together = config.method.together(sites)
    return {
        "init_args": {
            "num_cpus": workers,
            "log_to_driver": False,
            "include_dashboard": False,
        },
        "client_resources": {"num_cpus": min(1.0, workers / together), "num_gpus": 0.0},
    }


def _arriving(events: _Events, runner: threading.Thread) -> Iterator[Event]:
    """Yield the events of a simulation that runs in a thread, up to None; raise what it raised."""
    while True:
        try:
            event = events.get(timeout=1.0)
        except queue.Empty:
            if not runner.is_alive():
                raise ConfigError(
                    "Flower's simulation ended without a result; -v shows its log"
                ) from None

            continue

        if event is None:
            break
        if isinstance(event, BaseException):
            runner.join(timeout=30)
            raise event

        yield event


def _site_names(config: RunConfig) -> tuple[str, ...]:
    """Return the names of the sites in the configuration's data."""
    from fluvial.data import SiteTexts
    from fluvial.models.tokenizers import load_tokenizer

    return SiteTexts(config.data, load_tokenizer(config.model), seed=config.seed).names
