"""Tables of a server's runs and sites."""

from rich.console import Group, RenderableType
from rich.text import Text

from fluvial.formatting import human_bytes, human_seconds, safe_text
from fluvial.report.tables import table
from fluvial.storage.run_files import JsonObject


def status_tables(status: JsonObject) -> Group:
    """Return tables of the runs, newest first, and sites that `server_operator.status` lists."""
    content: list[RenderableType] = []
    if status["runs"]:
        runs = [
            _run_row(run)
            for run in sorted(status["runs"], key=lambda run: str(run["pending-at"]))[::-1]
        ]
        content.append(
            table(["run", "number", "status", "took", "in", "out"], runs, "Runs", left=3)
        )
        content += [
            Text(f"{run['run-id']}: {safe_text(run['status-details'])}", style="dim")
            for run in status["runs"]
            if run["status-details"] not in ("", "N/A")
        ]
    else:
        content.append(Text("No runs."))

    if status["sites"]:
        sites = [_site_row(site) for site in status["sites"]]
        content.append(table(["site", "status", "since"], sorted(sites), "Sites", left=3))
    else:
        content.append(Text("No sites."))

    return Group(*content)


def _run_row(run: JsonObject) -> list[str]:
    """Return the row of a run; bytes are Flower's count: in from the sites, out to them."""
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


def _site_row(site: JsonObject) -> list[str]:
    """Return the row of a site by its registered name; without a key it has Flower's number."""
    status = safe_text(site["status"])
    since = {"online": site["online-at"], "offline": site["offline-at"]}.get(
        status, site["created-at"]
    )

    return [safe_text(site.get("name") or f"node {site['node-id']}"), status, safe_text(str(since))]
