"""Part `link` of `benchmarks.engine`: round times over a slow line, predicted and measured.

`fluvial check` predicts from bytes and the line, with the engine's own times as they are in the
package. Beside it is the same formula with times that are measured in the same run, on the same
deployment, without the lines of `benchmarks.engine.line`. So nothing that is predicted was fitted
to a line.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.engine.cells import Cell, names_of, table_of
from benchmarks.engine.fleets import MARK, Watch, environment_of, marked
from benchmarks.engine.line import SERVER, Lines, Setting, inside
from benchmarks.report import Row
from fluvial.federation.line import FLOWER, Engine, Line, round_s
from fluvial.runs.config import parse
from fluvial.runs.plan import plan
from tests.support import flower_lab

# -- the table ------------------------------------------------------------------------------------


def rows(
    settings: Sequence[Setting],
    payloads: Sequence[float],
    *,
    sites: int,
    rounds: int,
    folder: Path,
    ends: float,
) -> Iterator[Row | str]:
    """Yield rounds without the line, then over each line; a prediction uses of the measured only
    what has no line.

    What is not reached before `ends` (of `time.monotonic`) is reported as a sentence.
    """
    with over_lines(folder, sites) as (lab, lines):
        yield from _table(
            lab, lines, settings, payloads, sites=sites, rounds=rounds, folder=folder, ends=ends
        )


@contextmanager
def over_lines(folder: Path, sites: int) -> Iterator[tuple[flower_lab.Deployment, Lines]]:
    """Start a server and its sites, each in a namespace of its own, still past the lines."""
    environment = environment_of(folder)
    names = names_of(sites)
    lines = Lines(sites)
    lab = flower_lab.Deployment(
        (folder / "lab").resolve(), flower_lab.free_port(), False, False, tuple(names), environment
    )
    lab.folder.mkdir(parents=True)

    try:
        with inside(lines.server):
            lab.command("server", "init", str(lab.server), "--address", f"{SERVER}:{lab.port}")
            lab.start_server()
            lines.use(None)

            for name, namespace in zip(names, lines.sites, strict=True):
                lab.make_site(name)
                file = lab.site(name) / "site.toml"
                file.write_text(
                    file.read_text().replace(f"127.0.0.1:{lab.port}", f"{SERVER}:{lab.port}")
                )

                with inside(namespace):
                    lab.start_site(name)

            lab.wait_online(sites, timeout=300)
            yield lab, lines
    finally:
        lab.end_all()
        lines.close()
        assert not marked(environment[MARK])


def _table(
    lab: flower_lab.Deployment,
    lines: Lines,
    settings: Sequence[Setting],
    payloads: Sequence[float],
    *,
    sites: int,
    rounds: int,
    folder: Path,
    ends: float,
) -> Iterator[Row | str]:
    straight = [
        _measured(lab, Cell("warm", payload, sites, rounds), None, folder) for payload in payloads
    ]
    yield from straight
    engine = fitted(straight)

    for setting in settings:
        lines.use(setting)
        yield {"part": "line", "link": _words(setting), **lines.tried()}
        for payload in payloads:
            if time.monotonic() > ends:
                yield f"link: {_words(setting)}, {payload:g} MB: no time left"
                continue

            row = _measured(lab, Cell("warm", payload, sites, rounds), setting, folder)
            table = table_of(Cell("warm", payload, sites, rounds), folder)
            line = line_of(setting)
            table["fleet"] |= {"line": line.model_dump()}
            row["predicted_s"] = plan(parse(table, "link"))["round_over_line_s"] + row["train_s"]
            row["off"] = row["predicted_s"] / row["round_s"] - 1
            down = int(row["bytes_down"])
            up = int(row["bytes_up"])
            row["fitted_s"] = round_s(
                down, up, sites=sites, line=line, engine=engine, train_s=row["train_s"]
            )
            yield row


def line_of(setting: Setting) -> Line:
    """Return a line as the prediction wants it."""
    return Line(
        up_mbit_s=setting.mbit_s,
        down_mbit_s=setting.mbit_s,
        rtt_ms=2 * setting.delay_ms,
        loss=setting.loss,
        shared=setting.shared,
    )


def _measured(lab: flower_lab.Deployment, cell: Cell, setting: Setting | None, folder: Path) -> Row:
    """Mean of the rounds after the first, since each has its own losses; the run is stopped after
    them."""
    began = time.time()
    seen = Watch(lab.environment)
    out = folder / f"{_words(setting)} {cell.payload_mb:g}".replace(" ", "-").replace(
        "/", ""
    ).replace("%", "")
    number = lab.submit(table_of(cell, folder), out)
    seen.rounds(out, cell.rounds, alive=lambda: True, timeout=900)
    found = seen.row(cell, began)
    lab.command("stop", str(lab.server), str(number))
    lab.finished(number)

    return {
        "part": "link",
        "link": _words(setting),
        "payload_mb": cell.payload_mb,
        "sites": cell.sites,
        "round_s": statistics.mean(record["seconds"] for record in seen.records[1:]),
        "fastest_s": min(record["seconds"] for record in seen.records[1:]),
        "slowest_s": max(record["seconds"] for record in seen.records[1:]),
        **{key: found[key] for key in ("train_s", "bytes_up", "bytes_down")},
    }


def fitted(straight: Sequence[Row]) -> Engine:
    """Return the engine's own times, from rounds without a line: a straight line through the
    smallest and the largest."""
    small = straight[0]
    large = straight[-1]
    moved = [(row["bytes_down"] + row["bytes_up"]) / 1e6 for row in (small, large)]
    apart = [row["round_s"] - row["train_s"] for row in (small, large)]
    rate = (
        max(0.0, (apart[1] - apart[0]) / (moved[1] - moved[0]))
        if moved[1] > moved[0]
        else FLOWER.s_per_mb
    )

    return Engine(fixed_s=apart[0] - rate * moved[0], s_per_mb=rate)


def _words(setting: Setting | None) -> str:
    if setting is None:
        return "none"
    loss = f", {100 * setting.loss:g} % lost" if setting.loss else ""
    shared = ", shared" if setting.shared else ""
    return f"{setting.mbit_s:g} Mbit/s, {2 * setting.delay_ms:g} ms{loss}{shared}"
