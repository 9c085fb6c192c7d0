"""The cross-site matrix as people see it."""

import pytest

from fluvial.report.cross_site import FEDERATED, cross_site_table, matrix_of


def result(sites: int) -> dict[str, object]:
    """A run whose own models lose 0.1 nats for each step away from their site."""
    names = [f"site {number}" for number in range(sites)]
    local = {
        model: {data: {"loss": 2.0 + 0.1 * abs(row - column)} for column, data in enumerate(names)}
        for row, model in enumerate(names)
    }
    return {
        "cross_site": {"local": local, "federated": {name: {"loss": 2.15} for name in names}},
    }


def test_few_sites_have_a_column_each_and_many_have_means() -> None:
    few = cross_site_table(result(3))
    assert few is not None
    assert few.headings == ["model of", "site 0", "site 1", "site 2", "others"]
    assert few.rows[0] == ["site 0", "2.00", "2.10", "2.20", "2.1500"]
    assert few.rows[-1] == [FEDERATED, "2.15", "2.15", "2.15", "2.1500"]

    many = cross_site_table(result(9))
    assert many is not None
    assert many.headings == ["model of", "own data", "other sites' data"]
    assert many.rows[0] == ["site 0", "2.0000", "2.4500"]
    assert many.rows[-1] == [FEDERATED, "-", "2.1500"]


def test_its_sentence_compares_on_data_of_other_sites() -> None:
    matrix = matrix_of(result(3))
    assert matrix is not None
    assert "single sites have 2.1333 in the mean and the federated one 2.1500" in matrix.words
    assert "it is better in 2 of 6 pairs" in matrix.words


@pytest.mark.parametrize("value", [{}, {"cross_site": None}])
def test_there_is_none_where_it_was_not_measured(value: dict[str, object]) -> None:
    assert matrix_of(value) is None
    assert cross_site_table(value) is None
    assert matrix_of(result(3), "exact_match") is None


def test_a_site_that_sent_nothing_leaves_its_cells_empty() -> None:
    run = result(2)
    run["cross_site"]["federated"].pop("site 1")  # type: ignore[index]
    found = cross_site_table(run)
    assert found is not None
    assert found.rows[-1] == [FEDERATED, "2.15", "not measured", "2.1500"]
