"""`fluvial plan`: the choice within a budget, or the plan of every site, before any round."""

from fluvial.cli.console import ConfigPath, Format, Overrides, load_config, print_content
from fluvial.cli.progress import spinner


def plan(config: ConfigPath, overrides: Overrides = None, format: Format = "table") -> None:
    """Show each site's ranks, batch, format, memory, bytes and time of a round, and which method
    and codec suit the sites.

    The sites measure themselves and probe the weights in this process; no round is run. With a
    table `budget`, show the adapter, steps and codecs that a run would choose, and the trials.
    """
    settings = load_config(config, overrides)
    if settings.budget is not None:
        with spinner("trying adapters and codecs on public text"):
            from fluvial.report.budget_tables import budget_table
            from fluvial.runs.budget.preview import choice_alone

            choice = choice_alone(settings)

        print_content(choice, format, budget_table)
        return

    with spinner("measuring the sites"):
        from fluvial.report.site_plans import site_plans_table
        from fluvial.runs.site_plans import site_plans

        planned = site_plans(settings)

    print_content(planned, format, site_plans_table)
