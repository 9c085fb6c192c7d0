"""Tables that `check` and `preview` print for people."""

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fluvial.formatting import plain, table


def plan_table(planned: dict[str, Any]) -> Group:
    """Return the figures, sites and notes of a planned run."""
    model = planned["model"]
    title = f"{model['name']}: {model['parameters']:,} parameters, {model['trainable']:,} trainable"
    sites = [
        [
            plain(each["name"]),
            *(f"{each[key]:,}" for key in ("records", "train", "heldout", "truncated_records")),
        ]
        for each in planned["sites"]
    ]
    figures = table(
        ["", ""], [[plain(row["what"]), plain(row["value"])] for row in planned["rows"]], ""
    )
    figures.show_header = False
    parts: list[RenderableType] = [
        Text(title, style="bold"),  # as a table's title it would be wrapped to the table's width
        figures,
        table(["site", "records", "training", "held-out", "truncated"], sites, "Sites"),
    ]

    return Group(*parts, *(Text(f"• {plain(note)}") for note in planned["notes"]))


def preview_text(found: dict[str, Any], *, marks: bool = False) -> Group:
    """The tokens of some sequences; those that carry loss stand out, with `marks` also in «» where
    colours are lost."""
    parts: list[RenderableType] = [
        Text.assemble(
            f"site {plain(found['site'])}, {found['form']}: ",
            ("«loss»" if marks else "loss", "bold green"),
            ", ",
            ("no loss", "dim"),
        )
    ]
    for number, sequence in enumerate(found["sequences"], start=1):
        text = Text()
        for token in sequence["tokens"]:
            # One by one: `plain` over the text would count newlines that belong to different
            # tokens.
            pieces = "⏎\n".join(map(plain, token["text"].split("\n")))
            pieces = f"«{pieces}»" if marks and token["loss"] else pieces
            text.append(pieces, style="bold green" if token["loss"] else "dim")

        head = f"\nSequence {number}: {sequence['length']} tokens, {sequence['label_tokens']} with loss"
        parts += [Text(head, style="bold"), text]

    return Group(*parts)
