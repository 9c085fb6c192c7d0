"""`fluvial plan`: the plan of every site, and the method and codec for them, before any round."""

from fluvial.cli.console import ConfigPath, Format, Overrides, load_config, print_content
from fluvial.cli.progress import spinner


def plan(config: ConfigPath, overrides: Overrides = None, format: Format = "table") -> None:
    """Show each site's ranks, batch, format, memory, bytes and time of a round, and which method
    and codec suit the sites.

    The sites measure themselves and probe the weights in this process; no round is run.
    """
    settings = load_config(config, overrides)
    with spinner("measuring the sites"):
        from fluvial.report.site_plans import site_plans_table
        from fluvial.runs.site_plans import site_plans

        planned = site_plans(settings)

    print_content(planned, format, site_plans_table)
