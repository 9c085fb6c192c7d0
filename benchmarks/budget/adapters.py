"""The default adapter: what each adapter reaches with and without a limit on bytes.

    python -m benchmarks.budget --part adapters [--cell NAME ...] [--seeds N]
        [--cache FILE.jsonl] [--out FILE.json]

Each adapter has the local learning rate that is best for its own uncompressed run on seed 0; where
that is the largest of the bed, twice as large ones are tried until one is worse. "uncompressed" has
no limit on bytes. "equal bytes" codes each update with trellis, at the rate that gives all adapters
the frames that rank 2 on all linear layers has at 1/64, with error feedback.
"""

from collections.abc import Sequence
from statistics import mean

from benchmarks.budget.bed import Bed, Runs, resolve
from benchmarks.cgfedllm.bed import Table
from benchmarks.codecs.figures import bytes_until
from benchmarks.report import Claim, Row
from fluvial.models.pool import ModelPool

ADAPTERS: dict[str, Table] = {
    "r 8, q, k, v, o": {"r": 8, "target_modules": "attention"},
    "r 2, all linear": {"r": 2, "target_modules": "all-linear"},
    "r 8, all linear": {"r": 8, "target_modules": "all-linear"},
}
"""Adapters by name; alpha is twice the rank."""
OURS = "r 8, all linear"
"""The default."""
SMALLEST = "r 2, all linear"
RATE = 64
"""Rate of the smallest adapter at equal bytes."""
MOST_LEARNING_RATE = 0.1
CELLS = ("fairytales", "fairytales, embedded model", "shakespeare", "mini_ops", "babi")


def measure(cell: str, bed: Bed, runs: Runs) -> list[Row]:
    """Return the rows of one cell: uncompressed and coded, by adapter and seed."""
    sizes = {name: _num_values(cell, bed, name) for name in ADAPTERS}
    rows: list[Row] = []
    for name in ADAPTERS:
        rate = _learning_rate(cell, bed, runs, name)
        for seed in range(bed.seeds):
            coded = {
                "name": "trellis",
                "rate": RATE * sizes[name] / sizes[SMALLEST],
                "error_feedback": True,
            }
            for limit, tables in (("none", {}), ("equal bytes", {"codec": coded})):
                run = runs.one(resolve(cell, bed, rate, seed, lora=_lora(name), **tables))
                rows.append(
                    {
                        "cell": cell,
                        "limit": limit,
                        "adapter": name,
                        "seed": seed,
                        "learning_rate": rate,
                        "loss": run["loss"][-1],
                        "up": bytes_until(run, bed.rounds)["up"],
                    }
                )
    return rows


def claims(rows: Sequence[Row], cells: Sequence[str]) -> list[Claim]:
    """Return, for each cell, what all linear layers gain over q, k, v and o, and which rank is
    better at equal bytes."""
    found = []
    attention = next(iter(ADAPTERS))
    for cell in cells:
        losses = {
            (name, limit): mean(
                row["loss"]
                for row in rows
                if (row["cell"], row["adapter"], row["limit"]) == (cell, name, limit)
            )
            for name in ADAPTERS
            for limit in ("none", "equal bytes")
        }
        for own, other, limit in (
            (SMALLEST, attention, "none"),
            (OURS, attention, "equal bytes"),
            (OURS, SMALLEST, "equal bytes"),
        ):
            words = "uncompressed, fewer bytes" if limit == "none" else limit
            name = f"{cell}, {words}: loss of {own} less that of {other}, nats"
            value = losses[own, limit] - losses[other, limit]
            found.append(Claim(name, value, 0.0, "at most"))
    return found


def _lora(name: str) -> Table:
    return {**ADAPTERS[name], "lora_alpha": 2 * ADAPTERS[name]["r"]}


def _num_values(cell: str, bed: Bed, name: str) -> int:
    config = resolve(cell, bed, bed.learning_rates[0], 0, lora=_lora(name))
    return ModelPool(config.model, config.adapter).layout.numel


def _learning_rate(cell: str, bed: Bed, runs: Runs, name: str) -> float:
    """Return the learning rate with the least loss of the uncompressed run on seed 0."""
    losses: dict[float, float] = {}
    waiting = list(bed.learning_rates)
    while waiting:
        rate = waiting.pop(0)
        losses[rate] = runs.one(resolve(cell, bed, rate, 0, lora=_lora(name)))["loss"][-1]
        best = min(losses, key=losses.__getitem__)
        if not waiting and best == max(losses) and 2 * best <= MOST_LEARNING_RATE:
            waiting.append(2 * best)
    return best
