"""A site's journal: state that is pending, settled or dropped, and processes that are killed."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fluvial.federation.store
import fluvial.models.fingerprints
import fluvial.site_process.journal
import fluvial.site_process.process
import fluvial.storage.files
from fluvial.errors import CheckpointError
from fluvial.site_process.journal import Journal
from fluvial.wire.payload import Payload
from tests.support.site_process import Killed, header, held, kept, play


def test_what_the_server_accepted_is_kept_and_the_rest_dropped(tmp_path: Path) -> None:
    journal = play(tmp_path, (header(seq=3), 1))
    assert held(journal) == (None, None)
    journal = play(tmp_path, (header(round=2, seq=6, ack=3), 2))
    assert held(journal) == (1, 1)
    journal = play(tmp_path, (header(round=3, seq=9, ack=3), 3))  # the answer to 6 was not accepted
    assert held(journal) == (1, 1)
    journal.settle(header(round=4, seq=12, ack=9))
    assert held(journal) == (3, 3)


def test_a_message_that_comes_twice_keeps_once(tmp_path: Path) -> None:
    play(tmp_path, (header(seq=3), 1), (header(seq=3), 1))
    journal = Journal(tmp_path, "site")
    for _ in range(2):
        journal.settle(header(round=2, seq=6, ack=3))
        assert held(journal) == (1, 1)


def test_a_draft_is_moved_not_copied(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "site")
    draft = journal.store.draft("site", "one", Payload(values={"round": 1}))
    journal.settle(header())
    journal.post(header(), {"one": draft})
    assert not draft.exists()
    journal.settle(header(seq=2, ack=1))
    assert held(journal) == (1, None)


def test_a_new_session_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    first = [(header(round=n, seq=n, ack=n - 1), n) for n in (1, 2, 3)]
    journal = play(tmp_path, *first)
    assert held(journal) == (2, 2)
    journal.settle(header(session="second", round=2, seq=2, ack=1, base=1))
    assert held(journal) == (1, 1)


def test_a_new_session_keeps_what_its_checkpoint_accepted(tmp_path: Path) -> None:
    """The server had saved round 2 and was killed before the site could learn that its answer
    counted."""
    journal = play(tmp_path, (header(round=1, seq=1), 1), (header(round=2, seq=2, ack=1), 2))
    assert held(journal) == (1, 1)
    journal.settle(header(session="second", round=3, seq=3, ack=2, base=2))
    assert held(journal) == (2, 2)


def test_a_run_that_starts_anew_finds_nothing(tmp_path: Path) -> None:
    journal = play(tmp_path, *[(header(round=n, seq=n, ack=n - 1), n) for n in (1, 2)])
    journal.settle(header(session="second", round=0, seq=2, base=-1))
    assert held(journal) == (None, None)


def test_a_journal_that_is_damaged_says_so(tmp_path: Path) -> None:
    play(tmp_path, (header(), 1))
    (tmp_path / "site.pending" / "journal.json").write_text('{"session": "fi')
    with pytest.raises(CheckpointError, match=r"journal\.json is damaged.*remove .*site\.pending"):
        Journal(tmp_path, "site").settle(header(seq=2, ack=1))


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Callable[[], int]]]:
    """Kill at the n-th file operation, before or in the middle of it; tells how many there were."""
    write = fluvial.storage.files.write_atomically
    replace = Path.replace
    unlink = Path.unlink

    def arm(at: int) -> Callable[[], int]:
        count = 0

        def step() -> None:
            nonlocal count
            count += 1
            if count == at:
                raise Killed

        def writes(path: Path, data: bytes) -> None:
            step()
            (path.parent / f".{path.name}.partial").write_bytes(data[: len(data) // 2])
            step()
            write(path, data)

        def replaces(self: Path, target: Path) -> Path:
            step()
            return replace(self, target)

        def unlinks(self: Path, missing_ok: bool = False) -> None:
            step()
            unlink(self, missing_ok)

        for module in (fluvial.federation.store, fluvial.site_process.journal):
            monkeypatch.setattr(module, "write_atomically", writes)
        monkeypatch.setattr(Path, "replace", replaces)
        monkeypatch.setattr(Path, "unlink", unlinks)
        return lambda: count

    yield arm
    monkeypatch.undo()


def test_a_kill_at_any_file_operation_loses_nothing(
    tmp_path: Path, killer: Callable[[int], Callable[[], int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the site dies while it answers round 3, it holds round 2 when it is asked again, and
    goes on."""
    before = tmp_path / "before"
    play(before, (header(round=1, seq=1), 1), (header(round=2, seq=2, ack=1), 2))
    message = header(round=3, seq=3, ack=2)
    tries = 0

    while True:
        tries += 1
        folder = tmp_path / str(tries)
        shutil.copytree(before, folder)
        count = killer(tries)

        try:
            play(folder, (message, 3))
        except Killed:
            monkeypatch.undo()
        else:
            monkeypatch.undo()
            assert count() < tries
            break

        again = header(round=3, seq=4, ack=2)
        journal = Journal(folder, "site")
        journal.settle(again)
        assert held(journal) == (2, 2), tries
        journal.post(again, kept(3))
        journal.settle(header(round=4, seq=5, ack=4))
        assert held(journal) == (3, 3), tries
        journal.settle(header(session="second", round=3, seq=3, ack=2, base=2))
        assert held(journal) == (2, 2), tries

    assert tries > 10
