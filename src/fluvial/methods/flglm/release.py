"""Hidden states as they leave a site: clipped and disturbed, where the run is configured so.

The noise follows from the site's own secret and from what is sent, never from the run's seed. So a
conversation that is had again with the same content sends the same bytes, and another conversation
has independent noise. The site counts conversations of training in its ledger before anything
leaves, and refuses one that epsilon does not count.
"""

import hashlib

from torch import Tensor

from fluvial.federation.noise import derive_key
from fluvial.federation.releases import Mechanism, claim, secret_of
from fluvial.federation.sites import Site
from fluvial.methods.flglm.config import FlGlmConfig
from fluvial.methods.flglm.leakage.noise import HiddenNoise, NoiseConfig, clip_rows
from fluvial.wire.payload import Payload


class Release:
    """The mechanism of one site in one conversation; it does nothing where there is no noise."""

    def __init__(self, noise: NoiseConfig | None = None, key: bytes = b"") -> None:
        self.noise = noise
        self._mechanism = None if noise is None else HiddenNoise(noise, key)
        self._messages = 0

    @classmethod
    def in_training(cls, site: Site, message: Payload, *, round: int) -> "Release":
        """Return that of a round's conversation, which `message` began, counted in the ledger.

        Raises `PrivacyError` for one conversation more than there are rounds.
        """
        config: FlGlmConfig = site.method
        noise = config.noise
        if noise is None:
            return cls()

        mechanism = Mechanism("hidden states", noise.clip, noise.multiplier, site.rounds)
        folder = site.store.private(site.name)
        return cls(noise, claim(folder, mechanism, str(round).encode(), _digest(message)))

    @classmethod
    def in_use(cls, site: Site, message: Payload, *, task: str) -> "Release":
        """Return that of a conversation in which the model is used."""
        config: FlGlmConfig = site.method
        if config.noise is None or not config.noise.inference:
            return cls()
        return cls.in_audit(site, message, task=task)

    @classmethod
    def in_audit(cls, site: Site, message: Payload, *, task: str) -> "Release":
        """Return that of a conversation which measures what training would leak."""
        config: FlGlmConfig = site.method
        if config.noise is None:
            return cls()

        secret = secret_of(site.store.private(site.name))
        return cls(config.noise, derive_key(secret, "use", task.encode(), _digest(message)))

    def clip(self, rows: Tensor) -> Tensor:
        """Return rows (tokens, width) clipped, with a gradient."""
        return rows if self.noise is None else clip_rows(rows, self.noise.clip)

    def __call__(self, rows: Tensor, place: str = "") -> Tensor:
        """Return the rows (tokens, width) of the next message, clipped and disturbed.

        `place` names the message within the conversation, where it may be sent again: then the same
        rows have the same noise, and nobody can average it out. Else messages are counted.
        """
        if self._mechanism is None:
            return rows

        self._messages += 1
        return self._mechanism.release(rows, (place or str(self._messages)).encode())


def _digest(message: Payload) -> bytes:
    return hashlib.sha256(message.to_bytes()).digest()
