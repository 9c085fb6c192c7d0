"""The partition of one data set into sites. The drawing itself is flwr-datasets'."""

import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from fluvial.data.faults import shown
from fluvial.errors import ConfigError
from fluvial.settings import Settings


class Natural(Settings):
    """One site for each value of a column, such as a hospital's name."""

    by: Literal["column"] = "column"
    column: str
    """The column with the name of a record's site."""
    largest: int | None = Field(None, ge=1, le=10**6)
    """Number of sites that are kept, those with the most records; unset, all."""


class Iid(Settings):
    """Equal shares of the shuffled records."""

    by: Literal["iid"] = "iid"
    sites: int = Field(8, ge=1, le=10**6)
    """Number of sites."""


class Dirichlet(Settings):
    """Shares of each class drawn from a Dirichlet distribution: smaller `alpha`, more skew (Hsu et
    al. 2019)."""

    by: Literal["dirichlet"] = "dirichlet"
    column: str
    """The class of a record."""
    sites: int = Field(8, ge=1, le=10**6)
    """Number of sites."""
    alpha: float = Field(0.5, ge=1e-6, le=1e6)
    """Concentration of the distribution; a smaller one gives more skew."""
    min_records: int = Field(10, ge=1, le=10**9)
    """Least records of a site; the draw is repeated until every site has them."""


class Shards(Settings):
    """Records sorted by class and cut into shards; each site gets some (McMahan et al. 2017)."""

    by: Literal["shards"] = "shards"
    column: str
    """The class of a record."""
    sites: int = Field(8, ge=1, le=10**6)
    """Number of sites."""
    shards_per_site: int = Field(2, ge=1, le=10**6)
    """Shards of each site."""


class Files(Settings):
    """One site for each file of a folder, named after the file."""

    by: Literal["file"] = "file"


CLASS = "class"
"""Column of the table that partitioners draw from."""

Partition = Annotated[Natural | Iid | Dirichlet | Shards | Files, Field(discriminator="by")]


Drawn = Natural | Iid | Dirichlet | Shards
"""Partitions of one list of records."""


def split(
    classes: Sequence[str] | None, count: int, partition: Drawn, seed: int
) -> dict[str, list[int]]:
    """Return disjoint parts of `count` records, as their numbers from 0, by site name.

    `classes` has the text of `partition.column` for each record, None for `Iid`. The parts cover
    all records, save that shards are of equal size: what does not fill one for each site is left
    out. Raise `ConfigError` for a split that cannot be made.
    """
    if isinstance(partition, Natural):
        assert classes is not None, "a column has values"
        return _by_class(classes, partition.largest)

    if partition.sites > count:
        raise ConfigError(f"data.partition.sites={partition.sites}: there are only {count} records")

    if isinstance(partition, Iid):
        parts = _even(count, partition.sites, seed)
    else:
        parts = _drawn(classes, count, partition, seed)
    width = len(str(len(parts) - 1))
    return {f"site-{number:0{width}}": part for number, part in enumerate(parts)}


def _by_class(classes: Sequence[str], largest: int | None) -> dict[str, list[int]]:
    named: dict[str, list[int]] = {}
    for number, name in enumerate(classes):
        named.setdefault(name, []).append(number)
    if largest is not None and largest > len(named):
        raise ConfigError(
            f"data.partition.largest={largest}: there are only {len(named)} sites; remove it, or "
            "choose fewer"
        )

    kept = sorted(named, key=lambda name: (-len(named[name]), name))[:largest]
    return {name: named[name] for name in sorted(kept)}


def _even(count: int, sites: int, seed: int) -> list[list[int]]:
    """Return shuffled parts of equal size; the first ones have one record more where need be.

    They are those of flwr-datasets, without its import, which takes longer than a small run.
    """
    parts = np.array_split(np.random.default_rng(seed).permutation(count), sites)
    return [part.tolist() for part in parts]


def _drawn(
    classes: Sequence[str] | None, count: int, partition: Dirichlet | Shards, seed: int
) -> list[list[int]]:
    """Return the parts that a partitioner of flwr-datasets makes, a package that needs `datasets`
    and not flwr (docs/decisions/0005-partitioners.md)."""
    import datasets
    from flwr_datasets import partitioner as flower

    dataset = datasets.Dataset.from_dict(
        {"record": range(count)} | ({} if classes is None else {CLASS: classes})
    )
    chosen: Any

    if isinstance(partition, Dirichlet):
        chosen = flower.DirichletPartitioner(
            partition.sites, CLASS, partition.alpha, partition.min_records, seed=seed
        )
    else:
        assert isinstance(partition, Shards), "the last of the kinds"
        chosen = flower.ShardPartitioner(
            partition.sites, CLASS, num_shards_per_partition=partition.shards_per_site, seed=seed
        )

    chosen.dataset = dataset
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="The specified min_partition_size"
            )  # it tries again, then raises
            warnings.filterwarnings("ignore", category=FutureWarning, module="pyarrow")
            return [
                list(chosen.load_partition(number)["record"])
                for number in range(chosen.num_partitions)
            ]
    except (ValueError, ZeroDivisionError) as error:  # the latter for fewer records than shards
        raise ConfigError(_unsplit(classes, count, partition)) from error


def _unsplit(classes: Sequence[str] | None, count: int, partition: Drawn) -> str:
    """Return why records could not be split, and what to change."""
    if isinstance(partition, Shards):
        shards = partition.sites * partition.shards_per_site
        return (
            f"data.partition: by = 'shards' makes {partition.sites} x {partition.shards_per_site} "
            f"= {shards} shards, and there are only {count} records; lower sites or shards_per_site"
        )

    assert isinstance(partition, Dirichlet), "equal shares can always be drawn"
    values = len(set(classes or ()))
    return (
        "data.partition: by = 'dirichlet' drew 10 times and left a site with fewer than "
        f"min_records={partition.min_records} of the {count} records each time (column "
        f"{shown(partition.column)} has {values} values, alpha={partition.alpha}, "
        f"sites={partition.sites}); raise alpha, or lower min_records or sites"
    )


def alike(sites: Mapping[str, int]) -> list[str]:
    """Return a remark for each group of site names that differ in writing only.

    These are blanks, case, Unicode form and the form of a number. `sites` has the number of records
    of each site.
    """
    groups: dict[str, list[str]] = {}
    for name in sites:
        folded = "".join(unicodedata.normalize("NFKC", name).casefold().split())
        groups.setdefault(_number(folded) or folded, []).append(name)

    return [
        f"the sites {' and '.join(f'{shown(name)} ({sites[name]} records)' for name in names)} "
        "differ only in blanks, case, Unicode form or how a number is written, and are taken as "
        "different sites"
        for names in groups.values()
        if len(names) > 1
    ]


def _number(name: str) -> str | None:
    """Return one text for all forms of a number (1, 1.0, 01, 1e0), None for other names."""
    try:
        value = Decimal(name)
    except InvalidOperation:
        return None

    short = value.is_finite() and abs(value.adjusted()) < 100 and len(value.as_tuple().digits) <= 28
    return f"{value.normalize():f}" if short else None
