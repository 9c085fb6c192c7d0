"""The table of where the time of a round goes, by hand."""

from fluvial.report.round_times import round_times


def record(seconds: float, first: dict[str, float], second: dict[str, float]) -> dict[str, object]:
    times = {"server": {"coding": 0.0, "decoding": 0.5}, "sites": {"a": first, "b": second}}
    return {"round": 1, "seconds": seconds, "times": times}


def test_medians_over_rounds_of_means_over_sites() -> None:
    metrics = [
        record(50.0, {"training": 30.0, "transfer": 1.0}, {"training": 40.0, "transfer": 1.0}),
        record(10.0, {"training": 2.0, "transfer": 1.0}, {"training": 4.0, "transfer": 3.0}),
        record(8.0, {"training": 3.0, "transfer": 1.0}, {"training": 5.0, "transfer": 3.0}),
    ]
    excerpt = round_times(metrics)
    assert excerpt is not None
    assert excerpt.rows == [
        ["training", "4.0 s", "5.0 s", "40.0 %"],
        ["upload and waiting", "2.0 s", "3.0 s", "20.0 %"],
        ["waiting for other sites and the server", "5.0 s", "7.0 s", "50.0 %"],
        ["of this wait: decoding, at the server", "0.5 s", "0.5 s", "(5.0 %)"],
        ["round", "10.0 s", "-", "-"],
    ]


def test_runs_of_before_have_no_table() -> None:
    assert round_times([{"round": 1, "seconds": 2.0}]) is None
    assert round_times([]) is None
