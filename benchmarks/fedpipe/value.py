"""Part "value" of `benchmarks.fedpipe`: the planner's value V against the loss that is saved.

A site probes the weights as in a run. Then it trains from the start with random ranks, many times,
and the rank correlation (Spearman) of V with the decrease of its held-out loss is taken: over
adapters of all sizes, and over adapters that all have the same number of weights and one rank, in
which only the choice of the weights differs. The number of parameters is correlated beside it. A
row is the mean over seeds, which draw the sites, the text and the adapters anew; `runs` has each.
"""

from collections.abc import Sequence
from functools import partial
from random import Random
from statistics import mean

from scipy.stats import spearmanr

from benchmarks.fedpipe.bed import read_task
from benchmarks.fedpipe.contenders import CONTENDERS, FEDPIPE, RATES, configured
from benchmarks.report import Claim, Report, Row, show
from fluvial.federation.adapters import modules_of
from fluvial.federation.sites import Site, train_locally
from fluvial.federation.store import StateStore
from fluvial.methods.fedpipe.config import FedPipeConfig
from fluvial.methods.fedpipe.importance import Score
from fluvial.methods.fedpipe.planner.candidates import (
    VALUE_UNIT,
    Candidate,
    linear_candidates,
)
from fluvial.methods.fedpipe.scores import Scores, read_probe
from fluvial.methods.fedpipe.tasks import probe
from fluvial.models.pool import ModelPool
from fluvial.models.states import initial_state
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.opening import site_of, texts_of
from fluvial.training.evaluate import heldout
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import add

RANKS = (2, 4, 8, 16)
CHOSEN = 8
"""Weights of an adapter of one size, and their rank."""
STEPS = 16
"""Optimizer steps of a training."""
BAR = 0.5
KINDS = ("all sizes", "one size")
"""Kinds of random adapters."""
SCORES: tuple[Score, ...] = ("invariant", "sensitivity", "spectral")
"""Scores of importance."""


def measure(report: Report, *, tasks: Sequence[str], draws: int, seeds: int, quick: bool) -> None:
    """Add rows and claims to `report`, of so many random adapters of each kind and seed."""
    rows = [
        _mean(task, kind, runs)
        for task in tasks
        for kind, runs in _runs(task, draws=draws, seeds=seeds, quick=quick).items()
    ]

    report.rows += rows
    columns = {"task": "task", "draw": "adapters", "seeds": "seeds", "size": "parameters"}
    show("Rank correlation with the decrease", columns | {s: f"V, {s}" for s in SCORES}, rows)
    report.claims += [
        Claim(
            f"{row['task']}: rank correlation of V with the loss saved, adapters of {row['draw']}",
            row["invariant"],
            BAR,
            "at least",
        )
        for row in rows
    ]


def _runs(task: str, *, draws: int, seeds: int, quick: bool) -> dict[str, list[Row]]:
    """Return the correlations of each seed by kind of adapters."""
    runs: dict[str, list[Row]] = {kind: [] for kind in KINDS}
    for seed in range(seeds):
        bench = _Bench(task, seed=seed, quick=quick)
        scored = {score: bench.candidates(score) for score in SCORES}
        for kind in KINDS:
            runs[kind].append(_run(bench, kind, scored, draws))
    return runs


def _mean(task: str, kind: str, runs: Sequence[Row]) -> Row:
    """Return the row of one kind of adapters."""
    figures = {key: mean(run[key] for run in runs) for key in ("size", *SCORES)}
    first = runs[0]
    return {
        "part": "value",
        "task": task,
        "draw": kind,
        "draws": len(first["losses"]),
        "seeds": len(runs),
        **figures,
        "invariant_by_seed": [run["invariant"] for run in runs],
        "runs": list(runs),
    }


class _Bench:
    """One site of a task, which probes and trains."""

    def __init__(self, task: str, *, seed: int, quick: bool) -> None:
        table = configured(
            read_task(task, quick=quick),
            CONTENDERS[FEDPIPE],
            seed=seed,
            learning_rate=RATES[1],
            deadline_s=None,
        )
        self.config = parse(table, "benchmark")
        self.pool = ModelPool(self.config.model, self.config.adapter)
        self.texts = texts_of(self.config, self.pool)
        self.steps = 2 if quick else STEPS
        self.modules = modules_of(self.pool.layout.names)

    def site(self, config: RunConfig | None = None) -> Site:
        """Return the first site, as for a message."""
        config = config or self.config
        return site_of(config, self.texts.names[0], self.pool, self.texts, StateStore(None))

    def candidates(self, score: Score) -> list[Candidate]:
        """Return what a probe of the site says about the weights."""
        method = self.config.method
        assert isinstance(method, FedPipeConfig)
        method = method.model_copy(update={"importance": score})
        site = self.site(self.config.model_copy(update={"method": method}))
        read = partial(read_probe, modules=self.modules, rank=method.probe_rank)
        scores = Scores()
        scores.take({site.name: read(site.name, probe(site, Payload(values={"number": 0})))}, 0.0)
        return scores.candidates(linear_candidates(self.pool.outline.base, self.modules))

    def loss(self, ranks: dict[str, int]) -> float:
        """Return the held-out loss after a training with `ranks`; of the base for none."""
        site = self.site()
        run = self.pool.assignment(self.config.train.per_device_train_batch_size)
        site.assigned = run.with_ranks({name: ranks.get(name, 0) for name in self.modules})
        start = initial_state(site.layout, site.seed)
        settings = site.train.model_copy(update={"max_steps": self.steps})
        data = site.load()
        update, _ = train_locally(site, start, 1, examples=data.train, settings=settings)
        with self.pool.model(add(start, update), assignment=site.assignment) as model:
            sums = heldout(model, data.heldout, pad_token_id=self.pool.tokenizer.pad_token_id)
        return sums.loss_sum / sums.label_tokens


def _drawn(kind: str, modules: Sequence[str], random: Random) -> dict[str, int]:
    """Return the ranks of a random adapter."""
    if kind == "one size":
        return dict.fromkeys(random.sample(list(modules), CHOSEN), CHOSEN)
    count = random.randint(1, len(modules))
    return {name: random.choice(RANKS) for name in random.sample(list(modules), count)}


def _run(bench: _Bench, kind: str, scored: dict[Score, list[Candidate]], draws: int) -> Row:
    """Return the correlations of one kind of adapters with one seed."""
    random = Random(bench.config.seed)
    adapters = [_drawn(kind, bench.modules, random) for _ in range(draws)]
    losses = [bench.loss(ranks) for ranks in adapters]
    widths = {each.module: each.width for each in scored["invariant"]}
    sizes = [sum(widths[name] * rank for name, rank in ranks.items()) for ranks in adapters]
    values = {
        score: [
            sum(each.value(ranks.get(each.module, 0)) for each in candidates) / VALUE_UNIT
            for ranks in adapters
        ]
        for score, candidates in scored.items()
    }
    return {
        "seed": bench.config.seed,
        "size": _correlation(sizes, losses),
        **{score: _correlation(value, losses) for score, value in values.items()},
        "losses": losses,
        "parameters": sizes,
        "values": values["invariant"],
    }


def _correlation(figures: Sequence[float], losses: Sequence[float]) -> float:
    """Return Spearman's correlation of `figures` with the decrease of the loss."""
    return float(spearmanr(figures, [-loss for loss in losses]).statistic)
