"""Tables that `check` and `preview` print for people."""

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fluvial.formatting import safe_text
from fluvial.report.tables import table


def plan_table(planned: dict[str, Any]) -> Group:
    """Return the figures, sites and notes of a planned run."""
    model = planned["model"]
    title = f"{model['name']}: {model['parameters']:,} parameters, {model['trainable']:,} trainable"
    sites = [
        [
            safe_text(each["name"]),
            *(f"{each[key]:,}" for key in ("records", "train", "heldout", "truncated_records")),
        ]
        for each in planned["sites"]
    ]
    figures = table(
        ["", ""], [[safe_text(row["what"]), safe_text(row["value"])] for row in planned["rows"]], ""
    )
    figures.show_header = False
    parts: list[RenderableType] = [
        Text(title, style="bold"),  # as a table's title it would be wrapped to the table's width
        figures,
        table(["site", "records", "training", "held-out", "truncated"], sites, "Sites"),
    ]

    return Group(*parts, *(Text(f"• {safe_text(note)}") for note in planned["notes"]))


def preview_text(found: dict[str, Any], *, marks: bool = False) -> Group:
    """The tokens of some sequences; those that carry loss stand out, with `marks` also in «» where
    colours are lost."""
    parts: list[RenderableType] = [
        Text.assemble(
            f"site {safe_text(found['site'])}, {found['form']}: ",
            ("«loss»" if marks else "loss", "bold green"),
            ", ",
            ("no loss", "dim"),
        )
    ]
    for number, sequence in enumerate(found["sequences"], start=1):
        text = Text()
        for token in sequence["tokens"]:
            # Token by token: over the whole text, `safe_text` would count newlines of several tokens.
            pieces = "⏎\n".join(map(safe_text, token["text"].split("\n")))
            pieces = f"«{pieces}»" if marks and token["loss"] else pieces
            text.append(pieces, style="bold green" if token["loss"] else "dim")

        head = f"\nSequence {number}: {sequence['length']} tokens, {sequence['label_tokens']} with loss"
        parts += [Text(head, style="bold"), text]

    return Group(*parts)
