"""The reason for a choice within a budget, in words."""

from typing import Any

from fluvial.runs.budget.pairs import EXACT

__all__ = ["reason"]


def reason(record: dict[str, Any]) -> str:
    """Return the reason for a choice in one sentence."""
    limits = record["limits"]
    bytes_words = f"{record['up_bytes']:,} B up"
    if limits["up_bytes"] is not None:
        bytes_words += f" of {limits['up_bytes']:,} B"
    if limits["total_bytes"] is not None:
        both = record["up_bytes"] + record["down_bytes"]
        bytes_words += f", {both:,} B of {limits['total_bytes']:,} B in both directions"
    elif record["run_s"] is not None:
        bytes_words += f", receives {record['down_bytes']:,} B"
    if record["run_s"] is not None:
        bytes_words += f" and needs {_seconds(record['run_s'], limits['run_s'])}"

    if not record["trials"]:
        return f"nothing is open; the run sends at most {bytes_words} for a site"

    row = next(row for row in record["trials"] if row["chosen"])
    ended = [other for other in record["trials"] if other["rounds"] == other["of_rounds"]]
    steps = "" if row["max_steps"] is None else f", {row['max_steps']} steps a round"
    if "rounds" in record["chosen"]:
        steps += f" in {record['chosen']['rounds']} rounds"
    codec = f"{row['codec']} at 1/{row['rate']:.3g}"
    if "downlink" in record["chosen"]:
        codec += f", downlink {row['downlink']}"
        codec += "" if row["downlink"] == EXACT else f" at 1/{row['down_rate']:.3g}"
    why = (
        f"rank {row['r']} on {row['target_modules']}{steps}, {codec}: "
        f"least loss of {len(record['trials'])} candidates on public text, {row['loss']:.4f} after "
        f"{row['rounds']} rounds"
    )
    others = [other["loss"] for other in ended if other is not row and other["loss"] is not None]
    if others:
        why += f" (next {min(others):.4f}, base {record['base_loss']:.4f})"
    if round(row["loss"], 4) >= round(record["base_loss"], 4):
        why += (
            "; that is no better than the base, so this text tells little: set "
            "data.public_source to text like the sites'"
        )
    if round(record["alone_loss"], 4) < round(row["loss"], 4):
        why += f"; simulated sites that train alone do better ({record['alone_loss']:.4f})"
    return f"{why}; the run sends at most {bytes_words} for a site"


def _seconds(needed: float, limit: float) -> str:
    """Return the seconds that a run needs of those that it may take, with as many decimals as tell
    them apart, at most three."""
    for decimals in range(4):
        words = f"{needed:,.{decimals}f} s", f"{limit:,.{decimals}f} s"
        if words[0] != words[1]:
            break
    return " of ".join(words)
