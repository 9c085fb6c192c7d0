"""`fluvial check` and `fluvial preview`: a run's figures and its tokens, before any training."""

import time
from typing import Annotated

import typer

from fluvial.cli.console import (
    ConfigPath,
    Format,
    Overrides,
    load_config,
    out,
    print_content,
)
from fluvial.cli.progress import spinner
from fluvial.errors import MissingWeightsError


def check(
    config: ConfigPath,
    overrides: Overrides = None,
    time_it: Annotated[
        bool,
        typer.Option(
            "--time", help="Load the model, time an optimizer step and predict the time of a round."
        ),
    ] = False,
    format: Format = "table",
) -> None:
    """Check a configuration and its data; print parameters, bytes and memory without training."""
    settings = load_config(config, overrides)
    with spinner("loading model configuration and data"):
        from fluvial.report.plan_tables import plan_table
        from fluvial.runs.plan import plan

        try:
            planned = plan(settings)
        except MissingWeightsError:
            print_content(plan(settings, weights_needed=False), format, plan_table)
            raise

        if time_it:
            from fluvial.runs.timed_plan import timed

            planned = timed(settings, planned, started_s=time.process_time())

    print_content(planned, format, plan_table)


def preview(
    config: ConfigPath,
    site: Annotated[str | None, typer.Option(help="Name of a site; default the first.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Number of sequences.")] = 3,
    overrides: Overrides = None,
    format: Format = "table",
) -> None:
    """Show the tokens that a site trains on, and a held-out record; what carries loss is marked."""
    settings = load_config(config, overrides)
    with spinner("reading data"):
        from fluvial.report.plan_tables import preview_text
        from fluvial.runs.plan import preview as preview_tokens

        sequences = preview_tokens(settings, site, count)

    print_content(sequences, format, lambda tokens: preview_text(tokens, marks=not out.is_terminal))
