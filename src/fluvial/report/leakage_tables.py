"""Table of the tokens that a server could read, attack by attack."""

from fluvial.formatting import percent, safe_text
from fluvial.report.block_tables import Excerpt
from fluvial.storage.run_files import JsonObject


def leakage_by_attack(result: JsonObject) -> Excerpt | None:
    """Return the success of each attack on what sites send; None where nothing was attacked."""
    leakage = result.get("leakage")
    if not leakage:
        return None

    rows = [
        [
            safe_text(row["attack"]),
            *(percent(row[key]) for key in ("accuracy", "rouge_1", "rouge_2", "rouge_l")),
        ]
        for row in leakage["attacks"]
    ]
    words = (
        f"Attacks that sites ran on {leakage['texts']} texts of their own held-out text, "
        f"{leakage['tokens']} tokens, as a server could that has the public base and text of "
        "the same kind."
    )
    if leakage.get("uncounted"):
        words += (
            f" Further {leakage['uncounted']} tokens are not counted, because all texts of a site "
            "begin with them."
        )
    headings = ["attack", "tokens read", "ROUGE-1", "ROUGE-2", "ROUGE-L"]
    return Excerpt("Leakage, by attack", headings, rows, left=1, words=words)
