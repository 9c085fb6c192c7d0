"""Rates of a line in megabits per second, at which a site's bytes are shown as a time."""

from dataclasses import dataclass

from fluvial.storage.run_files import JsonObject


@dataclass(frozen=True)
class Rates:
    """Rates from a site to the server and back, and where they are from."""

    up_mbit_s: float = 20.0
    down_mbit_s: float = 20.0
    origin: str = ""
    """Setting that has them; empty for rates that no setting has."""

    @classmethod
    def of(cls, config: JsonObject) -> "Rates":
        """Return the rates of `fleet.line`, else `codec.uplink_mbps` both ways, else 20 Mbit/s."""
        line = (config.get("fleet") or {}).get("line")
        if line:
            return cls(line["up_mbit_s"], line["down_mbit_s"], "fleet.line")

        uplink = (config.get("codec") or {}).get("uplink_mbps")
        return cls(uplink, uplink, "codec.uplink_mbps") if uplink else PLAIN

    @property
    def heading(self) -> str:
        """Heading of the column of times."""
        return f"at {self.up_mbit_s:g} Mbit/s"

    @property
    def words(self) -> str:
        """Meaning of that column, as a sentence of a caption."""
        down = f", {self.down_mbit_s:g} Mbit/s down" if self.down_mbit_s != self.up_mbit_s else ""
        origin = f" ({self.origin})" if self.origin else ""
        return (
            f"A{self.heading[1:]}{down}{origin}: these bytes of one site on a line of its "
            "own, without round trips."
        )

    def seconds(self, up: float, down: float) -> float:
        """Return the seconds of `up` and `down` bytes, one direction after the other."""
        return 8 * (up / self.up_mbit_s + down / self.down_mbit_s) / 1e6


PLAIN = Rates()
"""20 Mbit/s both ways."""
