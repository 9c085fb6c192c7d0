"""`fluvial plan`: the choice within a budget, or the plan of every site, before any round."""

from fluvial.cli.console import ConfigPath, Format, Overrides, load_config, print_content
from fluvial.cli.progress import spinner
from fluvial.runs.planned import check_planned
from fluvial.storage.paths import value_at
from fluvial.storage.recipes import table_of


def plan(config: ConfigPath, overrides: Overrides = None, format: Format = "table") -> None:
    """Show each site's plan under method `fedpipe`, or the choice within a table `budget`.

    A plan has ranks, batch, format, memory, bytes and time of a round, and the page says which
    method and codec suit the sites, which measure themselves in this process. The choice has
    adapter, steps and codecs, with the trials. No round is run. A configuration with neither
    method `fedpipe` nor a table `budget` is refused.
    """
    if not overrides:  # so that a refusal needs no library
        table = table_of(config)
        name = value_at(table, ("method", "name"))
        if isinstance(name, str):
            check_planned(name, budget="budget" in table)
    settings = load_config(config, overrides)
    check_planned(settings.method.name, budget=settings.budget is not None)
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
