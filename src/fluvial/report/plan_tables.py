"""Tables that `fluvial check` and `fluvial preview` print."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fluvial.data.faults import shown
from fluvial.formatting import safe_text
from fluvial.report.tables import table
from fluvial.storage.run_files import JsonObject

SITE_COLUMNS = {
    "train_records": "training\nrecords",
    "train": "training\nsequences",
    "heldout_records": "held-out\nrecords",
    "heldout": "held-out\nsequences",
    "truncated_records": "truncated\nrecords",
}
"""Headings of the counts of a site, by their keys in a plan."""
MOST_OTHERS = 20
"""Names of other sites that a preview lists."""


def plan_table(planned: JsonObject) -> Group:
    """Return the figures, sites and notes of a planned run."""
    model = planned["model"]
    title = f"{model['name']}: {model['parameters']:,} parameters, {model['trainable']:,} trainable"
    sites = [
        [
            safe_text(site["name"]),
            *(f"{site[key]:,}" for key in SITE_COLUMNS),
        ]
        for site in planned["sites"]
    ]
    content: list[RenderableType] = [
        Text(title, style="bold"),  # as a table's title it would be wrapped to the table's width
        figures_table(planned),
        table(["site", *SITE_COLUMNS.values()], sites, "Sites"),
    ]

    return Group(*content, *(Text(f"• {safe_text(note)}") for note in planned["notes"]))


def figures_table(planned: JsonObject) -> Table:
    """Return the sizes of a planned run."""
    rows = [[safe_text(row["what"]), safe_text(row["value"])] for row in planned["rows"]]
    figures = table(["", ""], rows, "")
    figures.show_header = False
    return figures


def preview_text(preview: JsonObject, *, marks: bool = False) -> Group:
    """Return the tokens of some sequences, with colours for those that carry loss.

    With `marks` these stand in «» too, for outputs without colours.
    """
    learned = "«what stands in these marks»" if marks else "what is green"
    content: list[RenderableType] = [
        Text.assemble(
            f"site {safe_text(preview['site'])}: ",
            (learned, "bold green"),
            " is learned (it has loss), ",
            ("the rest is read only", "dim"),
        ),
        Text(
            f"{preview['train_records']:,} training records in {preview['train']:,} sequences, "
            f"{preview['heldout_records']:,} held-out records{_others(preview)}"
        ),
    ]
    names = [f"Sequence {number}" for number, _ in enumerate(preview["sequences"], start=1)]
    names += ["Held out, which is measured and not trained"] * len(preview["heldout"])
    sequences = (*preview["sequences"], *preview["heldout"])
    for name, sequence in zip(names, sequences, strict=True):
        text = Text()
        for token in sequence["tokens"]:
            # Token by token: `safe_text` would count the newlines of several tokens as one run.
            pieces = "⏎\n".join(map(safe_text, token["text"].split("\n")))
            pieces = f"«{pieces}»" if marks and token["loss"] and pieces else pieces
            text.append(pieces, style="bold green" if token["loss"] else "dim")

        lengths = f"{sequence['length']} tokens, {sequence['label_tokens']} with loss"
        content += [Text(f"\n{name}: {lengths}", style="bold"), text]

    return Group(*content)


def _others(preview: JsonObject) -> str:
    """Return the names of the other sites, as the end of a line."""
    others = [shown(name) for name in preview["sites"] if name != preview["site"]]
    more = ", ..." if len(others) > MOST_OTHERS else ""
    listed = f"{', '.join(others[:MOST_OTHERS])}{more}"
    return f"; --site NAME shows another site: {listed}" if others else ""
