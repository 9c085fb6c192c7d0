"""A proposed configuration: made of facts and answers, written as text, and checked."""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluvial.data.faults import listed
from fluvial.data.site_names import PLAIN, plain_fault_of
from fluvial.data.templates import NAMED
from fluvial.errors import ConfigError
from fluvial.runs.config import parse, with_chat_template
from fluvial.runs.plan import plan
from fluvial.runs.proposal.columns import as_options
from fluvial.runs.proposal.document import document
from fluvial.runs.proposal.duration import Duration, duration_of
from fluvial.runs.proposal.heldout import Heldout
from fluvial.runs.proposal.lengths import measure_lengths, proposed_length
from fluvial.runs.proposal.limits import LIMITS, Limit
from fluvial.runs.proposal.models import ModelFacts
from fluvial.runs.proposal.records import DataFacts, RecordFiles, SeparateFacts
from fluvial.runs.proposal.same_form import in_one_form
from fluvial.runs.proposal.settings import Answers, sections
from fluvial.runs.proposal.sites import Sites, answer_pairs, unused_words
from fluvial.storage import paths
from fluvial.storage.files import expanded


@dataclass(frozen=True)
class Proposal:
    """The text of a configuration, what was found, and what `check` says about it."""

    text: str
    found: tuple[str, ...]
    """Lines about model, records and sites."""
    planned: dict[str, Any]
    """Result of `runs.plan.plan`."""
    duration: Duration
    """Time of the run on this machine."""
    assumed: tuple[str, ...] = ()
    """Lines about what was assumed for lack of an answer, with the remedies."""


def propose(
    file: Path,
    model: ModelFacts,
    data: DataFacts,
    sites: Sites,
    limits: frozenset[Limit],
    *,
    uplink_mbps: float | None = None,
    public: str | None = None,
    heldout: Mapping[str, Heldout] | None = None,
) -> Proposal:
    """Return a configuration for `file`, which is not written.

    `heldout` has the held-out records that are given, see `heldout.fitted`.

    Raises `ConfigError` where the facts allow no run, or `check` refuses what follows from them.
    """
    data, heldout = in_one_form(data, heldout or {}, has_template=model.has_template)
    chats = [each.is_conversation for each in (data, *(own.facts for own in heldout.values()))]
    if model.template is not None and not any(chats):
        raise ConfigError(
            "--chat-template: without effect, because no records are conversations; remove it"
        )
    lengths = measure_lengths(data, model, [own.facts for own in heldout.values()])
    is_text = data.form == "text"
    answers = Answers(
        model=model,
        model_path=path_from(file, model.name) if model.local else model.name,
        template=_template_from(file, model.template),
        data=data,
        data_path=_named(file, data.files),
        data_paths={name: _named(file, part.files) for name, part in data.parts.items()}
        if isinstance(data, SeparateFacts)
        else {},
        sites=sites,
        lengths=lengths,
        max_length=proposed_length(lengths, model.context, text=is_text),
        limits=limits,
        uplink_mbps=uplink_mbps,
        public_path=None if public is None else path_from(file, public),
        heldout=heldout,
        heldout_paths={name: _named(file, own.facts.files) for name, own in heldout.items()},
    )
    limited = "; ".join(LIMITS[limit] for limit in LIMITS if limit in limits) or "none"
    head = [
        # In the past tense, so that it stays true where the user edits the file.
        f"`fluvial init` wrote this file for {model.name} and {sites.words()}; limits that were "
        f"named: {limited}. Only what differs from the defaults is set: docs/settings.md has every "
        "setting.",
    ]
    text = document(head, sections(answers))
    table = paths.beside(tomllib.loads(text), file)
    config = with_chat_template(parse(table, str(file)))
    planned = plan(config)
    duration = duration_of(config, planned["sites"], model, lengths)
    return Proposal(text, _found(answers), planned, duration, answers.assumed)


def _found(answers: Answers) -> tuple[str, ...]:
    data = answers.data
    lengths = answers.lengths
    columns = ", ".join(data.names[:12]) + (", ..." if len(data.names) > 12 else "")
    unused = unused_words(data, answers.sites)
    pairs = answer_pairs(data, answers.sites)
    further = "".join(f"; for {' -> '.join(pair)}: {as_options(*pair)}" for pair in pairs[:1])
    return (
        f"model: {answers.model.words()}",
        f"records: {len(data.rows):,}, form {data.forms}, columns {columns}",
        *([f"not used: {unused}{further}"] if unused else []),
        f"sites: {answers.sites.words()}; {answers.sites.why}",
        *_only_here(answers.sites),
        f"lengths in tokens: middle {lengths.quantile(0.5):,}, longest {lengths.longest:,} of "
        f"{lengths.sample}; "
        f"with loss at most {lengths.longest_answer:,}",
    )


def _only_here(sites: Sites) -> list[str]:
    """Return a line about the names that no site with a process of its own can have."""
    names = [name for name in sites.counts if plain_fault_of(name) is not None]
    if not names:
        return []
    return [
        f"names: {listed(names)} cannot be sites with a process of their own (docs/deploy.md), "
        f"whose names are {PLAIN}"
    ]


def _named(file: Path, records: RecordFiles) -> str:
    """Return the name of a source as `file` has it."""
    return path_from(file, records.source) if records.local else records.source


def _template_from(file: Path, template: str | None) -> str | None:
    """Return a chat template as `file` names it: a file of one by its path."""
    named = template is None or template in NAMED or "{" in template
    return template if named else path_from(file, str(template))


def path_from(file: Path, name: str) -> str:
    """Return a path as `file` names it: relative to its folder if it lies below, else whole."""
    path = Path(os.path.realpath(expanded(name)))
    folder = Path(os.path.realpath(file)).parent  # that of pathlib raises for a loop of links
    return (
        Path(os.path.relpath(path, folder)).as_posix() if path.is_relative_to(folder) else str(path)
    )
