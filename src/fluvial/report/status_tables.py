"""Tables of a server's runs and sites."""

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fluvial.formatting import human_bytes, human_seconds, safe_text
from fluvial.report.tables import table


def status_tables(found: dict[str, Any]) -> Group:
    """Runs and sites of a server, newest run first, as `fluvial.flower.server_operator.status`
    tells them."""
    parts: list[RenderableType] = []
    if found["runs"]:
        runs = [
            _status_of_run(run)
            for run in sorted(found["runs"], key=lambda run: str(run["pending-at"]))[::-1]
        ]
        parts.append(table(["run", "number", "status", "took", "in", "out"], runs, "Runs", left=3))
        parts += [
            Text(f"{run['run-id']}: {safe_text(run['status-details'])}", style="dim")
            for run in found["runs"]
            if run["status-details"] not in ("", "N/A")
        ]
    else:
        parts.append(Text("No runs."))

    if found["sites"]:
        sites = [_status_of_site(site) for site in found["sites"]]
        parts.append(table(["site", "status", "since"], sorted(sites), "Sites", left=3))
    else:
        parts.append(Text("No sites."))

    return Group(*parts)


def _status_of_run(run: dict[str, Any]) -> list[str]:
    """Bytes as Flower counts them at the server: in from the sites, out to them."""
    traffic = run["network-traffic"]
    status = safe_text(run["status"]).removeprefix("finished:")
    sizes = [human_bytes(traffic[f"{way}-bytes"]) for way in ("inbound", "outbound")]

    return [
        safe_text(run.get("name") or "-"),
        str(run["run-id"]),
        status,
        human_seconds(run["elapsed"]),
        *sizes,
    ]


def _status_of_site(site: dict[str, Any]) -> list[str]:
    """A site by the name it was registered under; one without a key has only Flower's number."""
    status = safe_text(site["status"])
    since = {"online": site["online-at"], "offline": site["offline-at"]}.get(
        status, site["created-at"]
    )

    return [safe_text(site.get("name") or f"node {site['node-id']}"), status, safe_text(str(since))]
