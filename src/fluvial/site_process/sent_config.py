"""Configuration of a run as the server sends it to one site: without what concerns other sites."""

from typing import Any

OTHERS = "another-site"
"""Name in place of all other sites that have a table in `data.by_site`."""
NOT_TOLD = "not-told.jsonl"


def for_site(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the settings of a run, as JSON types, as they are sent to the site `name`.

    Of tables and lists by site, they have its own alone. Where other sites have a table in
    `data.by_site`, a table without content says so, so that a site without one refuses the run and
    does not read default records.
    """
    sent = dict(settings)
    data = dict(settings.get("data", {}))
    if by_site := data.get("by_site"):
        own = {name: by_site[name]} if name in by_site else {OTHERS: {"source": NOT_TOLD}}
        sent["data"] = {**data, "by_site": own}

    fleet = settings.get("fleet", {})
    if sites := fleet.get("sites"):
        sent["fleet"] = {**fleet, "sites": [each for each in sites if each == name]}

    method = settings.get("method", {})
    if budgets := method.get("budgets"):
        own_budgets = [budget for budget in budgets if budget["site"] == name]
        sent["method"] = {**method, "budgets": own_budgets}

    return sent
