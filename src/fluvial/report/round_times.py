"""Table of where the time of a round goes, from the seconds that sites and server report."""

import statistics
from collections.abc import Sequence

from fluvial.formatting import human_seconds
from fluvial.report.block_tables import Excerpt
from fluvial.storage.run_files import JsonObject

AT_SITES = {
    "download": "download",
    "training": "training",
    "coding": "coding, at the site",
    "other": "other work of the site",
    "transfer": "upload and waiting",
    "unreported": "sites, not by part",
    "measuring": "held-out measures",
}
"""Parts of a site's time, and their names for people."""
REST = "waiting for other sites and the server"
"""The rest of a round, at a site."""
AT_SERVER = {
    "coding": "of this wait: coding, at the server",
    "decoding": "of this wait: decoding, at the server",
}
"""Parts of that rest, whose shares are in brackets, since they are counted in it."""


def round_times(metrics: Sequence[JsonObject]) -> Excerpt | None:
    """Return the seconds of each part of a round; None where no round has them."""
    records = [record for record in metrics if record.get("times", {}).get("sites")]
    if not records:
        return None

    rows = []
    for part, words in AT_SITES.items():
        rounds = [
            [seconds.get(part, 0.0) for seconds in record["times"]["sites"].values()]
            for record in records
        ]
        means = [statistics.fmean(sites) for sites in rounds]
        rows.append((words, means, [max(sites) for sites in rounds]))
    rests = [
        [
            max(0.0, record["seconds"] - sum(parts.values()))
            for parts in record["times"]["sites"].values()
        ]
        for record in records
    ]
    rows.append((REST, [statistics.fmean(rest) for rest in rests], [max(rest) for rest in rests]))
    for part, words in AT_SERVER.items():
        seconds = [record["times"]["server"].get(part, 0.0) for record in records]
        rows.append((words, seconds, seconds))

    whole = statistics.median(record["seconds"] for record in records)
    cells = [
        [words, _words(means), _words(longest), _share(statistics.median(means), whole, words)]
        for words, means, longest in rows
        if any(means)
    ]
    cells.append(["round", human_seconds(whole), "-", "-"])
    return Excerpt(
        "Where the time of a round goes",
        ["part", "mean of sites", "longest site", "share of the round"],
        cells,
        left=1,
        words="Medians over rounds. In each round a site's parts and its wait for the other sites "
        "and the server add up to the round, so their medians nearly do; what the server codes "
        "and decodes is a part of this wait, with its share in brackets.",
    )


def _words(seconds: Sequence[float]) -> str:
    return human_seconds(statistics.median(seconds))


def _share(seconds: float, whole: float, words: str) -> str:
    share = f"{100 * seconds / whole:.1f} %" if whole else "-"
    return f"({share})" if words in AT_SERVER.values() else share
