"""The benchmarks run, write their files, and say for each claim whether it holds."""

import json
from pathlib import Path

import pytest

from benchmarks.codecs import bytes_to_target, rate_distortion, snr, speed, target_claims
from benchmarks.codecs.bed import Found
from benchmarks.codecs.cache import SOURCE, Cache
from benchmarks.codecs.contenders import CONTENDERS, Bed, Contender, Role, resolve
from benchmarks.fedcybgd import bed as fedcybgd_bed
from benchmarks.fedcybgd import compute, contenders, download, jobs, losses, paper, pictures
from benchmarks.fedcybgd.shapes import Shape
from benchmarks.report import Claim, Report, Row
from tests.support.benchmarks import quick_report


@pytest.mark.slow
def test_overhead(tmp_path: Path) -> None:
    """Start-up, three numbers of sites, and Flower or a word that it is not there."""
    content = quick_report("overhead", tmp_path / "overhead.json")
    ours = [row for row in content["rows"] if row["what"] == "fluvial"]
    assert [row["sites"] for row in ours] == [1, 10, 100]
    assert all(row["bytes_up"] > 131_072 for row in ours)
    assert any(row["what"].startswith("Flower") for row in content["rows"])
    held = {claim["name"]: claim["holds"] for claim in content["claims"]}
    assert held["MB that each further site costs, up to 100 sites"]


@pytest.mark.slow
def test_budget(tmp_path: Path) -> None:
    """The choice is within its budget, and one of those that were made by hand."""
    content = quick_report("budget", tmp_path / "budget.json")
    rows = {row["contender"]: row for row in content["rows"]}
    own = rows["budget"]
    assert own["up"] <= content["settings"]["share"] * rows["fixed r 8, trellis 1/64"]["up"]
    hand = [row["loss"] for name, row in rows.items() if name.startswith("by hand")]
    assert own["loss"] in hand


@pytest.mark.slow
def test_quantised(tmp_path: Path) -> None:
    """Every format has its costs, and its losses merged and not."""
    pytest.importorskip("bitsandbytes", reason="the extra `quantization` is not installed")
    content = quick_report("quantised", tmp_path / "costs.json", "--part", "costs")
    costs = {row["format"]: row for row in content["rows"] if row["allocator"] == "fixed"}
    stored = [costs[kind]["stored_bytes"] for kind in ("bfloat16", "int8", "nf4", "nf4-double")]
    assert stored == sorted(stored, reverse=True)
    content = quick_report("quantised", tmp_path / "merging.json", "--part", "merging")
    merged = [row for row in content["rows"] if "merged_loss" in row]
    assert len(merged) == 5
    for row in merged:  # merging in float changes the order of sums alone
        assert row["merged_loss"] == pytest.approx(row["adapter_loss"], rel=1e-4)


@pytest.mark.slow
def test_channel(tmp_path: Path) -> None:
    """Every contender at every size and kind of memory; ratios to the cipher, not to the clock."""
    content = quick_report("channel", tmp_path / "channel.json")
    rows = [row for row in content["rows"] if "both_mb_s" in row]
    assert len(rows) == 2 * 4 * 3
    assert {row["what"] for row in rows if row["both_mb_s"] > 0} == {
        "channel",
        "ChaCha20-Poly1305 alone",
        "AES-256-GCM alone",
    }
    assert len(content["claims"]) == 2 * 4 + 4


@pytest.mark.slow
def test_activations(tmp_path: Path) -> None:
    """Exact rows have no error, coded changes less than what they are changes of."""
    content = quick_report("activations", tmp_path / "activations.json")
    lost = {row["codec"]: row for row in content["rows"] if row["part"] == "error"}
    times = [row for row in content["rows"] if row["part"] == "time"]
    assert all(lost["exact"][end] == 0 for end in ("h_A", "h_B", "g_A", "g_B"))
    assert lost["int4, recurring"]["h_A"] < lost["int4"]["h_A"] / 5
    assert {row["bytes_token"] for row in times if row["codec"] == "int8"} == {898}
    assert all(row["encode_mb_s"] > 0 and row["decode_mb_s"] > 0 for row in times)


@pytest.mark.slow
def test_stream(tmp_path: Path) -> None:
    """Every kind of stream at every size, and the one claim."""
    content = quick_report("stream", tmp_path / "stream.json")
    assert {(row["size"], row["kind"]) for row in content["rows"]} == {
        (size, kind)
        for size in ("100 B", "1 MB", "16 MB")
        for kind in ("plain text", "TLS", "TLS and channel")
    }
    assert all(row["exchanges_s"] > 0 for row in content["rows"])
    assert len(content["claims"]) == 1


@pytest.mark.slow
def test_cgfedllm(tmp_path: Path) -> None:
    """Gate and loss on the embedded text; identity is exact whatever the size."""
    content = quick_report("cgfedllm", tmp_path / "cgfedllm.json")
    assert {row["part"] for row in content["rows"]} == {"gate", "loss"}
    held = {claim["name"][0]: claim["holds"] for claim in content["claims"]}
    assert set(held) == set("abcdef")
    assert held["f"]


@pytest.mark.slow
def test_rate_distortion(tmp_path: Path) -> None:
    """Real frames within their rate, on every codec that the package has."""
    content = quick_report("codecs", tmp_path / "rates.json", of="rate_distortion")
    rows = [row for row in content["rows"] if "part" not in row and row["seeds"]]
    assert {16, 32, 64, 128} <= {row["rate"] for row in rows}
    assert all(row["bytes"] <= row["raw_bytes"] / row["rate"] for row in rows if row["rate"])
    assert all(row["error"] >= 0 and -1 <= row["cosine"] <= 1 for row in rows)


@pytest.mark.slow
def test_codec_speed(tmp_path: Path) -> None:
    """Two small layouts."""
    content = quick_report("codecs", tmp_path / "speed.json", of="speed")
    assert {row["layout"] for row in content["rows"]} == {"d 64", "d 128"}
    assert all(row["encode_mb_s"] > 0 and row["decode_mb_s"] > 0 for row in content["rows"])


@pytest.mark.slow
def test_codec_snr(tmp_path: Path) -> None:
    """Fixed rates send fewer bytes the higher they are; a driven run has a claim."""
    content = quick_report("codecs", tmp_path / "snr.json", "--codec", "trellis", of="snr")
    sizes = [row["bytes_up"] for row in content["rows"] if not row["driven"]]
    assert sizes == sorted(sizes, reverse=True)
    driven = [row for row in content["rows"] if row["driven"]]
    assert len(content["claims"]) == len(driven) == len(snr.DRIVEN)
    assert all(len(set(row["up_by_round"])) > 1 for row in driven)


@pytest.mark.slow
def test_bytes_to_target(tmp_path: Path) -> None:
    """A row for every contender; a second run takes everything from the file."""
    options = ("--cache", str(tmp_path / "runs.jsonl"))
    content = quick_report("codecs", tmp_path / "bytes.json", *options, of="bytes_to_target")
    rows = {row["contender"]: row for row in content["rows"]}
    reference = rows["uncompressed"]
    int8 = rows["int8, both ways"]
    assert reference["reached"] == reference["seeds"] == 2
    assert reference["excess"] == 0
    assert int8["bytes_all"] < 0.3 * reference["bytes_all"] * int8["rounds"] / reference["rounds"]
    lines = (tmp_path / "runs.jsonl").read_text()
    again = quick_report("codecs", tmp_path / "again.json", *options, of="bytes_to_target")
    assert again["rows"] == content["rows"]
    assert (tmp_path / "runs.jsonl").read_text() == lines
    fewer = (*options, "--seeds", "1", "--rate-of-uncompressed")
    once = quick_report("codecs", tmp_path / "once.json", *fewer, of="bytes_to_target")
    assert {row["learning_rate"] for row in once["rows"]} == {reference["learning_rate"]}
    assert {row["seeds"] for row in once["rows"]} == {1}


@pytest.mark.slow
def test_adapters(tmp_path: Path) -> None:
    """Ours has its own choice and that with the common adapter, at the same target."""
    content = quick_report("codecs", tmp_path / "adapters.json", of="adapters")
    rows = {row["kind"]: row for row in content["rows"]}
    assert set(rows) == {"own", "common adapter"}
    assert rows["common adapter"]["adapter"] == "r 8, attention"
    assert rows["own"]["adapter"] in content["settings"]["adapters"]
    assert rows["own"]["frame_bytes"] < rows["common adapter"]["frame_bytes"]


@pytest.mark.slow
def test_fedcybgd_losses(tmp_path: Path) -> None:
    """A row for every contender; a second run takes everything from the file."""
    options = ("--part", "losses", "--cache", str(tmp_path / "runs.jsonl"))
    content = quick_report("fedcybgd", tmp_path / "losses.json", *options)
    rows = {row["contender"]: row for row in content["rows"]}
    assert set(rows) == set(contenders.QUICK_NAMES)
    full = rows[contenders.REFERENCE]
    ours = rows[contenders.OURS]
    assert full["ratio"] == full["up_share"] == full["memory_share"] == 1
    assert ours["up_share"] < 0.02
    assert ours["memory_share"] < 0.25
    lines = (tmp_path / "runs.jsonl").read_text()
    assert quick_report("fedcybgd", tmp_path / "again.json", *options)["rows"] == content["rows"]
    assert (tmp_path / "runs.jsonl").read_text() == lines


def test_known_rows_are_kept_and_compared_as_when_they_were_measured() -> None:
    """Shares of Fed-full follow from the losses by seed that are stored."""
    report = Report("fedcybgd", {})
    path = pictures.RESULTS / "fedcybgd_losses.json"
    known = losses.known_rows(path, report)
    cell = [row for row in known if row["cell"] == "shakespeare"]
    again = losses.table([], [{**row, "ratio": None, "gain_kept": None} for row in cell])
    stored = json.loads(path.read_text())
    assert report.skipped == stored["skipped"]
    assert len(known) == len(stored["rows"])
    assert all(row["source"] for row in known)
    for old, new in zip(cell, again, strict=True):
        assert new["ratio"] == pytest.approx(old["ratio"], abs=1e-5)
        assert new["gain_kept"] == pytest.approx(old["gain_kept"], abs=1e-4)


@pytest.mark.slow
def test_fedcybgd_download(tmp_path: Path) -> None:
    """The cache is exact, what compresses is not, and the codec of the upload makes the cache
    small."""
    content = quick_report("fedcybgd", tmp_path / "download.json", "--part", "download")
    rows = {row["form"]: row for row in content["rows"]}
    assert set(rows) == set(download.QUICK_FORMS)
    assert rows[download.EXACT]["cosine_tuned_least"] == pytest.approx(1)
    assert rows["stale subset 0.5"]["cosine_tuned"] < 1
    assert rows["proxy, kept 0.5"]["cosine_base"] < 0.9
    assert rows["cache, hadamard 1/16"]["down"] < 0.3 * rows[download.EXACT]["down"]


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc"
)
def test_fedcybgd_memory(tmp_path: Path) -> None:
    """One block takes less than everything, and less again from disk; the table has two models."""
    content = quick_report("fedcybgd", tmp_path / "memory.json", "--part", "memory")
    full, held, streamed = (row for row in content["rows"] if row["part"] == "memory")
    assert full["train_mb"] > held["train_mb"] > streamed["train_mb"]
    assert {row["model"] for row in content["rows"] if row["part"] == "shapes"} == {
        "LLaMA-2-7B",
        "Llama-3-8B",
    }


@pytest.mark.slow
def test_fedcybgd_paper(tmp_path: Path) -> None:
    """Losses before training and after each of two cycles, and the pictures of them."""
    options = ("--part", "paper", "--pictures", str(tmp_path / "pictures"))
    content = quick_report("fedcybgd", tmp_path / "paper.json", *options)
    rows = {row["contender"]: row for row in content["rows"]}
    assert set(rows) == {contenders.REFERENCE, paper.PAPER}
    assert all(len(row["curve"]) == 3 for row in rows.values())
    assert rows[contenders.REFERENCE]["first"] == rows[paper.PAPER]["first"]
    assert len(list((tmp_path / "pictures").glob("*.svg"))) == 3


def _ended(contender: str, loss: float, steps: int = 4) -> Row:
    row = {"part": "paper", "cell": "here", "contender": contender, "steps": steps, "seeds": 1}
    return row | {"loss": loss, "losses": [loss], "curve": [3.0, loss]}


def test_claims_of_the_papers_figures_by_hand() -> None:
    """Visits of other lengths are not compared, nor runs of other seeds."""
    rows = [
        _ended("ascending", 2.0),
        _ended("latin", 1.99),
        _ended("random", 1.0) | {"seeds": 2},
        _ended(paper.PAPER, 2.1),
        _ended(contenders.FEDBAVG, 1.9),
        _ended(paper.PAPER, 2.5, steps=paper.VISIT),
    ]
    found = {claim.name: claim for claim in paper.claims("here", rows)}
    values = [round(claim.value or 0, 6) for claim in found.values()]
    assert values == [0.005, 0.05, 0.1]
    assert [claim.holds for claim in found.values()] == [True, False, False]


def test_pictures_show_what_was_measured(tmp_path: Path) -> None:
    """Every contender of the rows is named in a picture, which is the same when drawn again."""
    rows = [_ended("ascending", 2.0), _ended(contenders.REFERENCE, 1.9, steps=paper.VISIT)]
    pictures.draw(tmp_path / "one", rows)
    pictures.draw(tmp_path / "two", rows)
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert drawn == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    assert set(drawn) == {f"fedcybgd_{name}.svg" for name in ("memory", "orders", "convergence")}
    assert pictures.large_bytes()["FedCyBGD"] == 2 * 6_738_415_616 + 16 * 202_383_360
    assert all(name.encode() in drawn["fedcybgd_convergence.svg"] for name in ("ascending", "150"))


@pytest.mark.slow
def test_fedcybgd_compute(tmp_path: Path) -> None:
    """A row for full tuning and one for every block."""
    content = quick_report("fedcybgd", tmp_path / "compute.json", "--part", "compute")
    assert [row["trains"] for row in content["rows"]] == [
        "full",
        *(f"block {index}" for index in range(4)),
    ]
    assert all(0 < row["share"] <= 1 for row in content["rows"])


def test_a_cache_is_shared_and_outlives_its_process(tmp_path: Path) -> None:
    """What one wrote the other finds, the newest line counts, a line that was cut off is not
    read."""
    path = tmp_path / "runs.jsonl"
    ours = Cache(path)
    theirs = Cache(path)
    ours.add("a", {"loss": [1.0]})
    assert theirs.find("a") == {"key": "a", "source": SOURCE, "loss": [1.0]}
    assert theirs.find("b") is None

    with path.open("a") as file:
        file.write('{"key": "a", "source": "older", "loss": [2.0]}\n{"key": "b", "sour')
    assert ours.find("a") == {"key": "a", "source": "older", "loss": [2.0]}
    assert ours.find("a", fresh=True) is None
    assert ours.find("b") is None
    assert Cache(None).find("a") is None


def test_the_key_of_a_run_is_its_configuration() -> None:
    """Another seed, rate or contender is another run; how many sites work at a time is not."""
    first = CONTENDERS[0]
    second = Contender("top_k", "assembled", {"name": "top_k", "rate": 64})
    configs = [
        resolve("stdlib", contender, bytes_to_target.QUICK, learning_rate=rate, seed=seed)
        for contender, rate, seed in (
            (first, 1e-3, 0),
            (first, 2e-3, 0),
            (first, 1e-3, 1),
            (second, 1e-3, 0),
        )
    ]
    assert len({Cache.key(config) for config in configs}) == 4
    faster = configs[0].model_copy(
        update={"fleet": configs[0].fleet.model_copy(update={"workers": 2})}
    )
    assert Cache.key(faster) == Cache.key(configs[0])


BED = Bed(
    rounds=3,
    steps=1,
    batch=1,
    tgap_rounds=2,
    heldout=1,
    seeds=2,
    learning_rates=(1.0, 2.0, 4.0),
    target=2,
)


def _run(loss: list[float], up: int, setup: int = 0) -> Row:
    return {
        "key": str(loss),
        "source": SOURCE,
        "loss": loss,
        "up": [2 * up] * 3,
        "down": [200] * 3,
        "setup": [2 * setup, 0, 0, 0],
        "sites": 2,
        "seconds": 1.0,
        "cpu_s": 1.0,
    }


def _found(name: str, role: Role, *runs: Row, rate: float | None = None) -> Found:
    return Found(
        "stdlib", Contender(name, role, rate=rate), {2.0: runs[0]}, list(runs), complete=True
    )


def test_bytes_to_target_by_hand() -> None:
    """Two seeds, the targets 3.0 and 4.0: rounds, bytes of one site, and the claims made of
    them."""
    reference = _found("uncompressed", "reference", _run([5, 3, 2], 1000), _run([5, 4, 3], 1000))
    ours = _found(
        "klt 1/64 + EF",
        "ours",
        _run([6, 4, 2.9], 10, setup=50),
        _run([6, 4, 3.5], 10, setup=50),
        rate=64,
    )
    slow = _found("int8, both ways", "published", _run([6, 5, 4], 100), _run([6, 4, 4], 100))
    other = _found(
        "hadamard 1/64 + EF", "assembled", _run([6, 5, 3], 40), _run([6, 4, 3.1], 40), rate=64
    )
    rows = {
        row["contender"]: row for row in bytes_to_target.table([reference, ours, slow, other], BED)
    }

    found = rows["klt 1/64 + EF"]
    assert (found["reached"], found["rounds"], found["seeds"], found["edge"]) == (2, 2.5, 2, False)
    assert (found["bytes_up"], found["bytes_down"], found["bytes_setup"]) == (25, 250, 50)
    assert found["bytes_all"] == 325
    assert found["excess"] == pytest.approx(0.7)
    assert rows["int8, both ways"]["reached"] == 1
    assert rows["uncompressed"]["bytes_all"] == 2200

    values = [claim.value for claim in target_claims.claims(list(rows.values()))]
    assert 325 / 500 in values, (
        "int8 is credited with the bytes of all three rounds in the seed that never got there"
    )
    assert values[-2:] == [1.0, 0.0], (
        "25 bytes up are 0.25 of 100, 325 of both ways are more than 0.6 of 350"
    )


def test_what_did_not_reach_the_target_wins_nothing() -> None:
    """A choice of ours that stays above the target makes no claim hold."""
    reference = _found("uncompressed", "reference", _run([5, 3, 2], 1000), _run([5, 4, 3], 1000))
    ours = _found("klt 1/64 + EF", "ours", _run([6, 5, 4], 1), _run([6, 5, 4.5], 1), rate=64)
    other = _found("int8, both ways", "published", _run([6, 5, 3], 40), _run([6, 4, 3.1], 40))
    rows = bytes_to_target.table([reference, ours, other], BED)
    assert [claim.value for claim in target_claims.claims(rows) if claim.name.startswith("1")] == [
        None
    ]


def test_gains_in_decibels() -> None:
    """Ten times less error is 10 dB, against the best codec that learns nothing at the same
    rate."""
    base = {"cell": "c", "rate": 64, "width": 128, "raw_bytes": 640, "bytes": 10.0, "cosine": 0.5}
    base |= {"error_mean": 0.5, "cosine_mean": 0.5}
    found: list[Row] = []

    for seed, error in enumerate((0.04, 0.05)):
        found.append(
            {
                **base,
                "codec": "klt",
                "source": "public",
                "learned": True,
                "seed": seed,
                "error": error,
            }
        )
        found.append(
            {**base, "codec": "vq", "source": "public", "learned": True, "seed": seed, "error": 0.1}
        )
        found.append(
            {
                **base,
                "codec": "hadamard",
                "source": "-",
                "learned": False,
                "seed": seed,
                "error": 10 * error,
            }
        )
        found.append(
            {**base, "codec": "top_k", "source": "-", "learned": False, "seed": seed, "error": 0.9}
        )

    rows = rate_distortion.over_seeds(found)
    assert [row["seeds"] for row in rows] == [2, 2, 2, 2]
    (gain,) = rate_distortion.gains(rows, found)
    assert gain["best"] == "hadamard"
    assert gain["gain_db"] == pytest.approx(10)
    (claim,) = rate_distortion.claims([gain])
    assert claim.bar == rate_distortion.BAR_LARGE


def test_driven_rates_are_compared_at_their_bytes() -> None:
    """The loss of fixed rates is a line in the logarithm of the bytes; nothing lies beyond it."""
    curve = [(400.0, 1.0), (100.0, 3.0)]
    assert snr.at_bytes(curve, 200.0) == pytest.approx(2.0)
    assert snr.at_bytes(curve, 50.0) is None
    row = snr.excess([curve, curve], [(200.0, 2.5), (400.0, 1.1)])
    assert row["excess"] == pytest.approx(0.3)
    assert snr.excess([curve], [(50.0, 2.5)])["excess"] is None


def test_synthetic_updates_have_the_layout_and_a_common_basis() -> None:
    """Like real ones: modules that read the same input share their directions."""
    layout = speed.LAYOUTS["d 64"].layout()
    first, second = speed.updates(layout, 2)
    assert layout.flatten(first).shape == (17_920,)
    q, k = (f"model.layers.0.self_attn.{name}.lora_A.weight" for name in ("q_proj", "k_proj"))
    spread = [(first[name].square() + second[name].square()).sum(0) for name in (q, k)]
    assert first[q].ne(second[q]).all()
    assert all(each.std() > 0 for each in spread)


def test_a_claim_that_does_not_hold_stays(tmp_path: Path) -> None:
    """Exit without an error, with the figure in the file; not measured is not held."""
    report = Report("none", {})
    report.claims = [
        Claim("too slow", 6.0, 5.0, "below"),
        Claim("just fits", 5.0, 5.0, "at most"),
        Claim("endless", float("inf"), 1.0, "at least"),
        Claim("not measured", None, 1.0, "at least"),
    ]
    report.finish(tmp_path / "none.json", (0.0, 0.0, 0.0))
    found = json.loads((tmp_path / "none.json").read_text())["claims"]
    assert [claim["holds"] for claim in found] == [False, True, True, False]
    assert [claim["value"] for claim in found] == [6.0, 5.0, "inf", None]


CELL = contenders.CELLS["embedded"]


@pytest.mark.parametrize(
    "which", [each for each in contenders.CONTENDERS if each.match], ids=lambda each: each.name
)
def test_contenders_of_fedcybgd_have_the_bytes_that_they_say(which: contenders.Contender) -> None:
    """Of rank and rate, no more bytes in a frame than the other and not much fewer; of rounds, in
    all of them."""
    assert which.match is not None
    mine, other = (
        fedcybgd_bed.resolve(CELL, each, jobs.FULL, pace=1.0, seed=0)
        for each in (which, contenders.contender(which.match.name))
    )
    spent, wanted = (fedcybgd_bed.frame_bytes(each) * each.rounds for each in (mine, other))

    if which.match.by == "rounds":
        assert mine.rounds > other.rounds
        assert spent == pytest.approx(wanted, rel=0.5 / other.rounds)
    else:
        assert mine.rounds == other.rounds
        assert 0.9 * wanted < spent <= wanted


def test_a_grid_goes_on_where_its_best_is_at_the_edge() -> None:
    assert fedcybgd_bed.beyond([0.5, 1.0, 2.0], 2.0) == [4.0]
    assert fedcybgd_bed.beyond([0.5, 1.0, 2.0], 0.5) == [0.25]
    assert fedcybgd_bed.beyond([0.5, 1.0, 2.0, 4.0], 2.0) == []


def test_memory_of_clients_by_formula() -> None:
    """20 bytes for a value that is trained, 4 for one that is not; from disk only the largest
    weight, in its turn."""
    parameters = 1_115_264
    block = 213_248
    embeddings = 2048 * 128
    found = {
        name: fedcybgd_bed.memory_bytes(
            fedcybgd_bed.resolve(CELL, contenders.contender(name), jobs.FULL, pace=1.0, seed=0)
        )
        for name in (
            contenders.REFERENCE,
            contenders.INT8,
            contenders.OURS,
            contenders.LORA,
        )
    }
    assert list(found.values()) == [
        20 * parameters,
        4 * parameters + 16 * block,
        16 * block + 4 * embeddings,
        4 * parameters + 20 * 81_920,
    ]


def _lost(contender: str, loss: float, *, up: float = 1.0) -> Row:
    row = {"cell": "c", "contender": contender, "seeds": 2, "loss": loss, "ratio": loss / 2}
    return row | {"up_share": up, "memory_share": up}


def test_claims_of_fedcybgd_by_hand() -> None:
    """Within 1 % of Fed-full, and against LoRA only where Fed-full beats it."""
    matched = next(
        each for each in contenders.CONTENDERS if each.match and each.match.name == contenders.OURS
    )
    rows = [
        _lost(contenders.REFERENCE, 2.0),
        _lost(contenders.OURS, 2.01, up=0.05),
        _lost(contenders.LORA, 2.1),
        _lost(matched.name, 2.05),
    ]
    report = Report("none", {})
    found = losses.claims(rows, report)
    assert [claim.value for claim in found] == pytest.approx([0.005, 0.05, 0.05, -0.04])
    assert all(claim.holds for claim in found)
    rows[2]["loss"] = 1.9
    assert len(losses.claims(rows, report)) == 3
    assert "does not beat" in report.skipped[0]


def test_the_cache_is_compared_with_the_cheapest_proxy_of_equal_loss() -> None:
    """Or, where no proxy comes near its loss, with the cheapest of all."""
    rows: list[Row] = [
        {"form": "proxy, kept 1", "seeds": 1, "loss": 2.0, "down": 80.0},
        {"form": "proxy, kept 0.5", "seeds": 1, "loss": 2.5, "down": 40.0},
        {"form": "cache, hadamard 1/16", "seeds": 1, "loss": 2.0, "down": 8.0},
        {"form": "stopped", "seeds": 0},
    ]
    assert [claim.value for claim in download.down_claims("c", rows)] == [10.0]
    rows[2]["loss"] = 1.9
    assert [claim.value for claim in download.down_claims("c", rows)] == [5.0]


def test_work_of_a_step_by_block() -> None:
    """Without a head, full tuning of two layers is 6; the upper block costs 2 + 1 + 1, the lower
    one 2 + 2 + 1."""
    shape = Shape(64, 128, layers=2, heads=4, key_value_heads=2, vocabulary=0)
    assert compute.predicted(shape, 1) == pytest.approx(4 / 6)
    assert compute.predicted(shape, 0) == pytest.approx(5 / 6)


@pytest.mark.slow
def test_leakage(tmp_path: Path) -> None:
    """Five attacks on every case, four where no gradient is exchanged; the claims hold."""
    content = quick_report("leakage", tmp_path / "leakage.json")
    cases = {(row["part"], row["case"]) for row in content["rows"]}
    assert len(content["rows"]) == 5 * len(cases)
    assert all(claim["holds"] for claim in content["claims"])


@pytest.mark.slow
def test_privacy_utility(tmp_path: Path) -> None:
    """Quality and tokens read of each case, and noise that hides the text and costs the model."""
    content = quick_report("privacy_utility", tmp_path / "privacy_utility.json")
    plain, noisy = content["rows"]
    assert noisy["hidden"] < plain["hidden"]
    assert noisy["loss"] > plain["loss"]
    assert all(claim["holds"] for claim in content["claims"])
