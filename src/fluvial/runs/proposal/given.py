"""The files that options name, read before any question is asked, with the faults of all."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fluvial.data.faults import Faults
from fluvial.runs.proposal.heldout import ALL, fitted_parts, read_heldout
from fluvial.runs.proposal.lengths import include_unfit
from fluvial.runs.proposal.models import ModelFacts
from fluvial.runs.proposal.records import DataFacts, RecordFiles, facts_about, readable_records
from fluvial.runs.proposal.same_form import parts_in_one_form
from fluvial.runs.proposal.separate import named_sources, parts_of
from fluvial.runs.proposal.undecided import UndecidedError, missing_options, noting


@dataclass(frozen=True)
class Given:
    """The rows of all files that can be read, and the faults of the others."""

    data: Sequence[RecordFiles]
    heldout: Mapping[str, RecordFiles]
    """Held-out records by site, see `read_heldout`."""
    faults: Mapping[str, Faults]
    """Faults of each source, and under "" those of several."""

    @property
    def is_faulty(self) -> bool:
        """True where a file cannot be read."""
        return any(faults.count for faults in self.faults.values())

    def include_faults(
        self,
        columns: Mapping[str, Mapping[str, str]],
        decide: Callable[[DataFacts], object],
        model: ModelFacts | None,
        faults: Faults,
    ) -> list[str]:
        """Add the faults of all files to `faults`, at least some of each file, and return the
        options that would answer what they leave undecided, as words of a command.

        `columns` has those that the caller renames by site, and under "" those of all sites.
        `decide` raises `ConfigError` for records of one source without sites or answers. Where
        there are faults, those of the records that can be read are added too, also by the tokenizer
        and the length of the `model`, where it is known.
        """
        parts: dict[str, DataFacts] = {}
        undecided: dict[str, UndecidedError] = {}
        if len(self.data) > 1:
            parts = parts_of(self.data, columns, None, self.faults, undecided)
        elif self.data and self.data[0].rows:
            files = self.data[0]
            whole = not self.faults[files.source].count
            with noting(self.faults[files.source], undecided):
                parts[ALL] = facts_about(files, columns.get("", {}))
                if whole:
                    decide(parts[ALL])

        apart = fitted_parts(self.heldout, parts, self.faults)
        if self.is_faulty or faults.count:
            for facts in (*parts.values(), *(each.facts for each in apart.values())):
                facts.include_faults(self.faults[facts.source])
            if model is not None:
                alike = parts_in_one_form(parts, apart, has_template=model.has_template)
                parts, apart = alike
                heldout = [each.facts for each in apart.values()]
                include_unfit(list(parts.values()), heldout, model, self.faults)

        faults.include_evenly(list(self.faults.values()))
        return missing_options(undecided, len(self.data))


def read_given(data: Sequence[str], heldout: Sequence[str], public: str | None) -> Given:
    """Return the rows of all sources that --data, --heldout and --public name.

    Raises `DataError` for a wrong name of a site.
    """
    faults = defaultdict[str, Faults](Faults)
    read = [
        replace(readable_records(source, "--data", faults[source]), site=site)
        for site, source in named_sources(data)
    ]
    apart = read_heldout(heldout, read, faults)
    if public is not None:
        readable_records(public, "--public", faults[public])
    return Given(read, apart, faults)
