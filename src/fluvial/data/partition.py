"""How one data set becomes many sites. The splitting itself is flwr-datasets'."""

import warnings
from contextlib import redirect_stderr
from io import StringIO
from typing import Annotated, Any, Literal

from pydantic import Field

from fluvial.errors import ConfigError
from fluvial.settings import Settings


class Natural(Settings):
    """One site for each value of a column, such as a hospital's name."""

    by: Literal["column"] = "column"
    column: str
    largest: int | None = Field(None, ge=1)
    """Keep only this many sites, those with the most records."""


class Iid(Settings):
    """Equal shares of the shuffled records."""

    by: Literal["iid"] = "iid"
    sites: int = Field(8, ge=1)


class Dirichlet(Settings):
    """Shares of each class drawn from a Dirichlet distribution: smaller `alpha`, more skew (Hsu et al. 2019)."""

    by: Literal["dirichlet"] = "dirichlet"
    column: str
    """The class of a record."""
    sites: int = Field(8, ge=1)
    alpha: float = Field(0.5, gt=0)
    min_records: int = Field(10, ge=1)
    """Drawn again until every site has so many."""


class Shards(Settings):
    """Records sorted by class and cut into shards; each site gets some (McMahan et al. 2017)."""

    by: Literal["shards"] = "shards"
    column: str
    """The class of a record."""
    sites: int = Field(8, ge=1)
    shards_per_site: int = Field(2, ge=1)


class Files(Settings):
    """One site for each file of a folder, named after the file."""

    by: Literal["file"] = "file"


Partition = Annotated[Natural | Iid | Dirichlet | Shards | Files, Field(discriminator="by")]


def split(dataset: Any, partition: Natural | Iid | Dirichlet | Shards, seed: int) -> dict[str, Any]:
    """Disjoint parts of `dataset` (a `datasets.Dataset`) by site name.

    The parts cover it, save that shards are of equal size: what does not fill one for everybody is left out.

    Raises `ConfigError` for a missing column or a split that cannot be made.
    """
    from flwr_datasets import partitioner as flower

    if not isinstance(partition, Iid) and partition.column not in dataset.column_names:
        raise ConfigError(
            f"data.partition.column={partition.column!r}: the data has the columns {', '.join(dataset.column_names)}"
        )
    if not isinstance(partition, Iid):
        blank = next((number for number, value in enumerate(dataset[partition.column]) if value is None), None)
        if blank is not None:
            raise ConfigError(f"data.partition.column={partition.column!r}: record {blank + 1} has no such field")
    if isinstance(partition, Natural):
        chosen = flower.NaturalIdPartitioner(partition.column)
    elif isinstance(partition, Iid):
        dataset = dataset.shuffle(seed=seed)  # flwr-datasets' IID split takes records in their order
        chosen = flower.IidPartitioner(partition.sites)
    elif isinstance(partition, Dirichlet):
        chosen = flower.DirichletPartitioner(
            partition.sites, partition.column, partition.alpha, partition.min_records, seed=seed
        )
    else:
        chosen = flower.ShardPartitioner(
            partition.sites, partition.column, num_shards_per_partition=partition.shards_per_site, seed=seed
        )
    if not isinstance(partition, Natural) and partition.sites > len(dataset):
        raise ConfigError(f"data.partition.sites={partition.sites}: there are only {len(dataset)} records")
    chosen.dataset = dataset
    try:
        # Its natural partitioner draws a progress bar of its own into standard error.
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.filterwarnings("ignore", message="The specified min_partition_size")  # it tries again, then raises
            warnings.filterwarnings("ignore", category=FutureWarning, module="pyarrow")
            parts = [chosen.load_partition(number) for number in range(chosen.num_partitions)]
    except (ValueError, ZeroDivisionError) as error:  # the latter for fewer records than shards
        raise ConfigError(f"data.partition: {partition!r} cannot split {len(dataset)} records: {error}") from error
    if isinstance(partition, Natural):
        named = {str(part[0][partition.column]): part for part in parts}
        largest = sorted(named, key=lambda name: (-len(named[name]), name))[: partition.largest]
        return {name: named[name] for name in sorted(largest)}
    width = len(str(len(parts) - 1))
    return {f"site-{number:0{width}}": part for number, part in enumerate(parts)}
