"""Memory of the base's frozen weights at both ends, as they are stored: quantised or not."""

from fluvial.methods.flglm.places import Places
from fluvial.methods.interface import CheckRow, Given
from fluvial.models.quantised import weight_bytes


def base_bytes(given: Given) -> dict[str, int]:
    """Return the bytes in memory of each of the base's weights, by name."""
    if given.quantisation:
        return weight_bytes(given.base, given.quantisation, given.correction_rank)
    named = given.base.named_parameters()
    return {name: parameter.numel() * given.width_bytes for name, parameter in named}


def base_rows(given: Given, places: Places) -> list[CheckRow]:
    """Return the rows about the base's weights in memory, at both ends."""
    stored = base_bytes(given)
    sizes = {"site": 0, "server": 0}
    floats = dict(sizes)
    for name, parameter in given.base.named_parameters():
        end = "server" if places.place(name) == "middle" else "site"
        sizes[end] += stored[name]
        floats[end] += parameter.numel() * given.width_bytes

    return [
        (
            f"base in memory, {end}",
            f"{size:,} B" + (f"; {floats[end]:,} B not quantised" if size != floats[end] else ""),
        )
        for end, size in sizes.items()
    ]
