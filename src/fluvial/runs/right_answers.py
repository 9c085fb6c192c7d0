"""Held-out answers of a run that were right, question by question, where its sites are in this
process: two runs that answer the same questions are compared as pairs."""

from collections.abc import Mapping
from typing import Any, Literal

from fluvial.federation.fleet import Fleet
from fluvial.methods.interface import Measures, Reporting, Server


def measured(
    server: Server, fleet: Fleet, reporting: Reporting, which: Literal["base", "final"]
) -> tuple[Measures, dict[str, str]]:
    """Return the measures of all sites at the end, and the marks of the answers at those of this
    process by site, see `answer_scores.right_answers`; no site sends them."""
    marks = reporting.pool.right_answers
    marks.clear()
    measures = server.measure(fleet, reporting, round=reporting.rounds, which=which)
    scores = {site: row.get("exact_match") for site, row in measures.by_site.items()}
    known = {site: own for site in scores if (own := marks.get(site))}
    right = {site: own for site, own in known.items() if own.count("1") / len(own) == scores[site]}
    return measures, right


def answers_of(base: Mapping[str, str], final: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the entry of a result; None where one of them is not known."""
    return {"base": dict(base), "final": dict(final)} if base and final else None
