"""Tables of a run by blocks: the block that each site trained in a cycle, and conflicts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fluvial.formatting import safe_text


def failures(metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replies that did not come, with their round."""
    return [
        {"round": record["round"], **each}
        for record in metrics
        for each in record.get("missing", [])
    ]


@dataclass(frozen=True)
class Excerpt:
    """Some of a long table, and words about all of it."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    left: int
    """Number of columns, from the first, that are texts."""
    words: str


def block_schedule(metrics: Sequence[dict[str, Any]], *, cycles: int, sites: int) -> Excerpt | None:
    """Return the blocks of the first `sites` in the last `cycles`; None for a method without
    visits."""
    records = [record for record in metrics if "visits" in record]
    if not records:
        return None

    visits = [visit for record in records for visit in record["visits"]]
    names = sorted({each["site"] for each in [*visits, *failures(records)]})
    shown = records[-cycles:]
    rows = [
        [safe_text(name), *(_trained(record["visits"], name) for record in shown)]
        for name in names[:sites]
    ]
    refused = sum(visit["share"] == 0 for visit in visits)
    scaled = sum(0 < visit["share"] < 1 for visit in visits)
    words = f"A number is a decoder layer. {len(visits)} visits: {refused} refused, {scaled} scaled (share in brackets)."
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


def _trained(visits: Sequence[dict[str, Any]], site: str) -> str:
    """Return the blocks that a site trained in a cycle: one, more where all data lies, - for
    none."""
    cells = [_cell(visit) for visit in visits if visit["site"] == site]
    return ", ".join(cells if len(cells) < 5 else [*cells[:2], "...", cells[-1]]) or "-"


def _cell(visit: dict[str, Any]) -> str:
    """`3` for layer 3, `4-7` for layers 4 to 7, and what was made of the step where it was not
    taken whole."""
    block = re.sub(r"^layers? ", "", safe_text(visit["block"])).replace(" to ", "-")
    share = visit["share"]

    return (
        block if share == 1 else f"{block} refused" if share == 0 else f"{block} (1/{1 / share:g})"
    )


def conflict_log(metrics: Sequence[dict[str, Any]], *, last: int) -> Excerpt | None:
    """The `last` pairs of sites that trained one block in one cycle; None if there are none."""
    made = [
        {"cycle": record["round"], **each}
        for record in metrics
        for each in record.get("conflicts", [])
    ]
    if not made:
        return None

    mean = sum(each["cosine"] for each in made) / len(made)
    words = f"{len(made)} times two sites trained one block in one cycle; mean cosine of what they sent {mean:.3f}."
    words += f" Shown: the last {last}." if len(made) > last else ""
    rows = []

    for each in made[-last:]:
        names = [each["block"], " and ".join(each["sites"]), each["resolved"]]
        rows.append([str(each["cycle"]), *map(safe_text, names), f"{each['cosine']:.3f}"])

    return Excerpt(
        "Conflict log", ["cycle", "block", "sites", "resolved", "cosine"], rows, left=4, words=words
    )
