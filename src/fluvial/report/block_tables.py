"""Tables of a run by blocks: the blocks that sites trained in each cycle, and their conflicts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fluvial.formatting import safe_text
from fluvial.storage.run_files import JsonObject


def failures(metrics: Sequence[JsonObject]) -> list[JsonObject]:
    """Return the missing replies of a run with their round."""
    return [
        {"round": record["round"], **failure}
        for record in metrics
        for failure in record.get("missing", [])
    ]


@dataclass(frozen=True)
class Excerpt:
    """Some rows of a long table, and a summary of all of it."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    left: int
    """Number of columns that hold texts, from the first; the others hold numbers."""
    words: str
    """Summary of the whole table, and what is not shown."""


def block_schedule(metrics: Sequence[JsonObject], *, cycles: int, sites: int) -> Excerpt | None:
    """Return the blocks of the first `sites` in the last `cycles`; None without visits."""
    records = [record for record in metrics if "visits" in record]
    if not records:
        return None

    visits = [visit for record in records for visit in record["visits"]]
    names = sorted({entry["site"] for entry in [*visits, *failures(records)]})
    shown = records[-cycles:]
    rows = [
        [safe_text(name), *(_trained(record["visits"], name) for record in shown)]
        for name in names[:sites]
    ]
    refused = sum(visit["share"] == 0 for visit in visits)
    scaled = sum(0 < visit["share"] < 1 for visit in visits)
    words = (
        f"A number is a decoder layer. {len(visits)} visits: {refused} refused, "
        f"{scaled} scaled (share in brackets)."
    )
    absent = [f"the first {len(records) - cycles} cycles"] if len(records) > cycles else []
    absent += [f"{len(names) - sites} sites"] if len(names) > sites else []
    words += f" Not shown: {' and '.join(absent)}." if absent else ""

    return Excerpt(
        "Block schedule, by cycle",
        ["site", *(str(record["round"]) for record in shown)],
        rows,
        left=1,
        words=words,
    )


def _trained(visits: Sequence[JsonObject], site: str) -> str:
    """Return the blocks that a site trained in a cycle, "-" for none.

    A site that holds all data trains many; the list of these is shortened.
    """
    cells = [_cell(visit) for visit in visits if visit["site"] == site]
    return ", ".join(cells if len(cells) < 5 else [*cells[:2], "...", cells[-1]]) or "-"


def _cell(visit: JsonObject) -> str:
    """Return a block in short, `3` or `4-7`, and the share of the step where it is not 1."""
    block = block_words(visit["block"])
    share = visit["share"]

    if share == 1:
        return block
    return f"{block} refused" if share == 0 else f"{block} (1/{1 / share:g})"


def block_words(name: str) -> str:
    """Return the name of a block in short: "4-7" for "layers 4 to 7"."""
    return re.sub(r"^layers? ", "", safe_text(name)).replace(" to ", "-")


def conflict_log(metrics: Sequence[JsonObject], *, last: int) -> Excerpt | None:
    """Return the `last` pairs of sites that trained one block in one cycle; None without any."""
    conflicts = [
        {"cycle": record["round"], **conflict}
        for record in metrics
        for conflict in record.get("conflicts", [])
    ]
    if not conflicts:
        return None

    mean = sum(conflict["cosine"] for conflict in conflicts) / len(conflicts)
    words = (
        f"{len(conflicts)} times two sites trained one block in one cycle; mean cosine of what "
        f"they sent {mean:.3f}."
    )
    words += f" Shown: the last {last}." if len(conflicts) > last else ""

    rows = []
    for conflict in conflicts[-last:]:
        names = [conflict["block"], " and ".join(conflict["sites"]), conflict["resolved"]]
        rows.append([str(conflict["cycle"]), *map(safe_text, names), f"{conflict['cosine']:.3f}"])

    return Excerpt(
        "Conflict log", ["cycle", "block", "sites", "resolved", "cosine"], rows, left=4, words=words
    )
