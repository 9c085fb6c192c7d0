"""The temporal ensemble of TGAP: updates of all sites over its rounds, on disk in a run's folder.

A run that is killed during TGAP goes on after the last whole round and fits the same codec. The
server holds at most the updates of one round in memory: a snapshot is read when it is used, as
pages of its file. Other settings of TGAP, or updates of another form, begin a new ensemble.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from fluvial.codecs.base import Snapshot
from fluvial.errors import CheckpointError
from fluvial.federation.meter import Kind
from fluvial.federation.store import StateStore
from fluvial.storage.run_files import anew
from fluvial.wire.payload import Payload, Value
from fluvial.wire.tensors import Layout, Named

_SERVER = "server"
_UPDATES = "updates"


@dataclass(frozen=True)
class Progress:
    """State of TGAP after a whole round."""

    round: int
    """0 before the first."""
    shared: Named
    """Adapter that the next round begins from, but for sites that go their own way."""
    traffic: Mapping[Kind, int]
    """Bytes sent so far, by direction and task."""


class Stored(Snapshot):
    """A snapshot whose tensors are read from their files whenever they are asked for."""

    def __init__(self, ensemble: "Ensemble", site: str, round: int) -> None:
        self.__dict__.update(site=site, round=round, _ensemble=ensemble)

    @property
    def received(self) -> Named:
        """Adapter that the site had received."""
        ensemble: Ensemble = self.__dict__["_ensemble"]
        return ensemble.received(self.site, self.round)

    @property
    def update(self) -> Named:
        """Update of the site."""
        ensemble: Ensemble = self.__dict__["_ensemble"]
        return ensemble.update(self.site, self.round)


def loaded(snapshots: Iterable[Snapshot]) -> list[Snapshot]:
    """Return the snapshots with their tensors, for a reader that outlives the files."""
    return [Snapshot(taken.site, taken.round, taken.received, taken.update) for taken in snapshots]


class Ensemble:
    """Snapshots of whole rounds. `folder=None` keeps their bytes in memory."""

    def __init__(
        self, folder: Path | None, made_of: Mapping[str, Value], start: Named, sent: Layout
    ) -> None:
        """`made_of` is what two ensembles must have in common for one to be gone on with.

        `start` is the adapter that all sites begin with, `sent` the layout of their updates.
        """
        self._start = start
        self._sent = sent
        self._made_of = dict(made_of)
        self._store = StateStore(folder)
        if self._store.read(_SERVER, "made_of").values != self._made_of:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            self._store = StateStore(folder)
            self._store.write(_SERVER, "made_of", Payload({}, self._made_of), 0)

    def progress(self) -> Progress:
        """Return the state after the last whole round."""
        rounds = list(self._rounds())
        if not rounds:
            return Progress(0, self._start, {})

        last = rounds[-1]
        traffic = {(way, task): size for way, task, size in last.value("traffic", list)}
        shared = {name: last.tensor(name) for name in self._start}
        return Progress(len(rounds), shared, traffic)

    def keep(self, snapshot: Snapshot, *, alone: bool) -> None:
        """Write a snapshot; it counts when its round is closed.

        `alone` says that its site goes its own way, so that what it received is written too.
        """
        holder = _holder(snapshot.site)
        number = snapshot.round
        self._store.write(holder, f"update{number}", Payload(snapshot.update), 0)
        if alone:
            self._store.write(holder, f"received{number}", Payload(snapshot.received), 0)

    def close(self, progress: Progress, sites: Sequence[str]) -> None:
        """Note that a round is whole, and which sites' snapshots count."""
        traffic: list[Value] = [[way, task, size] for (way, task), size in progress.traffic.items()]
        values: dict[str, Value] = {"sites": list(sites), "traffic": traffic}
        self._store.write(_SERVER, f"round{progress.round}", Payload(progress.shared, values), 0)

    def snapshots(self) -> list[Snapshot]:
        """Return the snapshots of whole rounds, by round and site."""
        return [
            Stored(self, site, number)
            for number, record in enumerate(self._rounds(), 1)
            for site in sorted(record.value("sites", list))
        ]

    def update(self, site: str, round: int) -> Named:
        """Return the update of a site in a round, in the order of its layout."""
        return self._tensors(_holder(site), f"update{round}", self._sent.names)

    def received(self, site: str, round: int) -> Named:
        """Return the adapter that a site had received in a round."""
        names = tuple(self._start)
        if self._holds(_holder(site), f"received{round}"):
            return self._tensors(_holder(site), f"received{round}", names)
        if round == 1:
            return self._start

        return self._tensors(_SERVER, f"round{round - 1}", names)

    def _rounds(self) -> Iterator[Payload]:
        """Yield the records of whole rounds, until the first that is missing."""
        number = 1
        while (record := self._store.read(_SERVER, f"round{number}")).values:
            yield record
            number += 1

    def _holds(self, holder: str, slot: str) -> bool:
        return any(name.startswith(f"{slot}-") for name in self._store.names(holder))

    def _tensors(self, holder: str, slot: str, names: Sequence[str]) -> Named:
        """Return tensors in the order of `names`, as pages of their file where there is one."""
        file = self._store.file(holder, slot)
        tensors = self._store.read(holder, slot).tensors if file is None else load_file(file)
        missing = [name for name in names if name not in tensors]
        if missing:
            where = f"{holder}, {slot}"
            raise CheckpointError(f"TGAP's ensemble: {where}: {missing[0]} is missing; {anew()}")

        return {name: tensors[name] for name in names}


def _holder(site: str) -> str:
    """Return the name under which the store keeps a site's files, apart from the server's."""
    return f"{_UPDATES}-{site}"
