"""The one call between server and sites: bytes, policies, deadlines, metering."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fluvial.errors import CheckpointError, ClientError, ConfigError
from fluvial.federation import in_process
from fluvial.federation.cohort import sample
from fluvial.federation.failures import Failure
from fluvial.federation.fleet import Fleet
from fluvial.federation.sites import Site
from fluvial.federation.store import StateStore
from fluvial.wire.payload import Payload
from tests.support.bare_sites import NAMES, site_fleet


def ask(found: Fleet, message: Payload | None = None) -> dict[str, Payload]:
    messages = dict.fromkeys(NAMES, message or Payload())
    return {
        r.site: r.content for r in found.ask("work", messages, round=1, read=lambda _, reply: reply)
    }


def echo(site: Site, message: Payload) -> Payload:
    return Payload(message.tensors, {"site": site.name})


def test_every_site_answers_through_real_bytes() -> None:
    sent = torch.arange(3.0)
    replies = ask(site_fleet(echo), Payload({"x": sent}))
    assert {name: reply.values["site"] for name, reply in replies.items()} == {
        name: name for name in NAMES
    }

    for reply in replies.values():
        assert torch.equal(reply.tensors["x"], sent)
        assert reply.tensors["x"].data_ptr() != sent.data_ptr()


def test_replies_come_as_they_are_ready() -> None:
    def slow_first(site: Site, message: Payload) -> Payload:
        time.sleep(0.3 if site.name == "a" else 0)
        return Payload()

    found = site_fleet(slow_first, workers=4)
    order = [
        r.site
        for r in found.ask(
            "work", dict.fromkeys(NAMES, Payload()), round=1, read=lambda _, reply: reply
        )
    ]
    assert order[-1] == "a"


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_no_more_sites_work_at_once_than_workers(workers: int) -> None:
    lock = threading.Lock()
    now = [0]
    most = [0]
    all_there = threading.Event()

    def count(site: Site, message: Payload) -> Payload:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
            if now[0] == workers:
                all_there.set()

        all_there.wait(10)
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return Payload()

    ask(site_fleet(count, workers=workers))
    assert most[0] == workers


def fail_at(*names: str) -> Callable[[Site, Payload], Payload]:
    def task(site: Site, message: Payload) -> Payload:
        if site.name in names:
            raise RuntimeError(f"the disk of {site.name} is on fire")
        return Payload()

    return task


def test_a_failing_site_stops_the_run_and_its_own_log_has_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(
        ClientError,
        match="RuntimeError at .*; fleet.on_failure='skip' would go on .*errors is in",
    ) as told:
        ask(site_fleet(fail_at("b"), store=StateStore(tmp_path)))

    assert "on fire" not in str(told.value)
    log = Path(str(told.value).rpartition(" ")[2])
    assert "Traceback" in log.read_text()
    assert "RuntimeError: the disk of b is on fire" in log.read_text()


def test_skip_goes_on_with_the_quorum_and_names_the_missing() -> None:
    found = site_fleet(fail_at("b"), on_failure="skip", quorum=0.75)
    assert sorted(ask(found)) == ["a", "c", "d"]
    assert [failure.site for failure in found.failures] == ["b"]


def test_a_missed_quorum_stops_the_run() -> None:
    found = site_fleet(fail_at("b", "c"), on_failure="skip", quorum=0.75)
    with pytest.raises(ClientError, match=r"2 of 4 sites answered.*missing: b, c"):
        ask(found)


def test_retry_asks_again_and_then_skips() -> None:
    calls: dict[str, int] = {}

    def flaky(site: Site, message: Payload) -> Payload:
        calls[site.name] = calls.get(site.name, 0) + 1
        if (site.name == "b" and calls["b"] < 3) or site.name == "c":
            raise RuntimeError("not yet")
        return Payload()

    found = site_fleet(flaky, on_failure="retry", retries=2, quorum=0.5, workers=1)
    assert sorted(ask(found)) == ["a", "b", "d"]
    assert calls == {"a": 1, "b": 3, "c": 3, "d": 1}


def test_a_silent_site_is_missed_after_the_deadline_and_its_late_answer_changes_nothing() -> None:
    release = threading.Event()
    store = StateStore(None)

    def hang(site: Site, message: Payload) -> Payload:
        site.keep("slot", Payload(values={"kept": site.name}))
        if site.name == "b":
            release.wait(5)
        return Payload()

    found = site_fleet(hang, store, on_failure="skip", quorum=0.5, deadline_s=0.3, workers=2)
    started = time.perf_counter()
    assert sorted(ask(found)) == ["a", "c", "d"]
    assert time.perf_counter() - started < 2
    assert "no answer within fleet.deadline_s=0.3" in found.failures[0].reason
    release.set()
    time.sleep(0.1)
    assert store.read("b", "slot").values == {}
    assert store.read("a", "slot").values == {"kept": "a"}


def test_a_reply_that_cannot_be_read_is_a_failure_of_that_site() -> None:
    def read(_site: str, reply: Payload) -> str:
        if reply.values["site"] == "c":
            raise ValueError("garbage")
        return str(reply.values["site"])

    found = site_fleet(echo, on_failure="skip", quorum=0.5)
    replies = found.ask("work", dict.fromkeys(NAMES, Payload()), round=1, read=read)
    assert sorted(reply.content for reply in replies) == ["a", "b", "d"]


def test_bytes_are_those_of_the_messages() -> None:
    message = Payload({"x": torch.randn(100)})
    metered = site_fleet(echo)
    replies = ask(metered, message)
    down = len(message.to_bytes())
    up = {name: len(reply.to_bytes()) for name, reply in replies.items()}
    assert metered.meter.totals["down", "work"] == 4 * down
    assert metered.meter.totals["up", "work"] == sum(up.values())
    by_site = metered.meter.close_round()
    assert by_site["a"] == {("down", "work"): down, ("up", "work"): up["a"]}
    assert metered.meter.close_round() == {}
    assert metered.meter.totals["down", "work"] == 4 * down


def test_messages_to_failed_sites_are_counted_too() -> None:
    metered = site_fleet(fail_at("b"), on_failure="skip", quorum=0.5)
    ask(metered)
    assert metered.meter.totals["down", "work"] == 4 * len(Payload().to_bytes())


def test_sampling_is_shepherds() -> None:
    names = [f"s{number}" for number in range(100)]
    cohort = sample(names, 0.05, seed=0, round=3)
    assert len(cohort) == 5
    assert cohort == sample(names, 0.05, seed=0, round=3)
    assert cohort != sample(names, 0.05, seed=0, round=4)
    assert sample(names, 0.001, seed=0, round=1) != []
    assert sample(names, 1.0, seed=0, round=1) == names


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_store_keeps_the_version_before_and_rolls_back(tmp_path: Path, in_memory: bool) -> None:
    store = StateStore(None if in_memory else tmp_path)
    for round in (1, 2, 4):
        store.write("north/../x", "residual", Payload(values={"round": round}), round)
    store.write("north/../x", "other", Payload(values={"round": 0}), 0)
    assert store.read("north/../x", "residual").values == {"round": 4}
    store.rollback(3)
    assert store.read("north/../x", "residual").values == {"round": 2}
    assert store.read("north/../x", "other").values == {"round": 0}
    store.rollback(1)
    assert store.read("north/../x", "residual").values == {}  # version 1 was dropped when 4 came
    assert all(tmp_path in path.resolve().parents for path in tmp_path.rglob("*"))


def test_a_full_disk_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StateStore(tmp_path)
    store.write("a", "slot", Payload(values={"round": 1}), 1)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        CheckpointError, match="No space left on device. What was there before is untouched"
    ):
        store.write("a", "slot", Payload(values={"round": 2}), 2)

    assert store.read("a", "slot").values == {"round": 1}
    assert list(tmp_path.rglob("*.partial")) == []


@pytest.mark.parametrize("reason", ["", "\n\n", " \u2028"])
def test_a_failure_has_a_reason_whatever_the_site_told(reason: str) -> None:
    """A round's record holds its last line, and a reason without lines ended the whole run."""
    failure = Failure("west", 1, "train", reason, 0)
    assert failure.reason.strip().splitlines()[-1] == "it gave no reason"


def test_a_site_that_the_run_does_not_have_is_named() -> None:
    fleet = site_fleet(echo)
    with pytest.raises(ConfigError, match="asks site 'mars', and the sites of the run are"):
        list(fleet.ask("work", {"mars": Payload()}, round=1, read=lambda _, reply: reply))


def test_a_stop_that_lands_in_a_finaliser_is_silent_and_comes_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(in_process, "_AGAIN_S", 0.2)
    at_work = threading.Event()
    ended = threading.Event()

    class Busy:
        """Work on in a finaliser, where Python drops an exception."""

        def __del__(self) -> None:
            at_work.set()
            until_s = time.monotonic() + 1.0
            while time.monotonic() < until_s:
                pass

    def task(site: Site, message: Payload) -> Payload:
        del site, message
        try:
            busy = Busy()
            del busy
            while True:
                time.sleep(0.01)
        finally:
            ended.set()

    fleet = site_fleet(task)
    asking = fleet.ask("work", {"a": Payload()}, round=1, read=lambda *_: None)
    threading.Thread(target=lambda: next(asking, None), daemon=True).start()
    assert at_work.wait(5)
    fleet.close()
    assert ended.wait(5)
    assert "_Stopped" not in capsys.readouterr().err
