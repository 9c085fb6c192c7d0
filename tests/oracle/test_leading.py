"""The largest components of a change: what a site sends first, and how the server counts it."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fluvial.codecs import CODECS, build, read_settings
from fluvial.data import SiteTexts
from fluvial.errors import ConfigError, WireError
from fluvial.exchange.checks import can_code
from fluvial.federation.adapters import (
    AggregationSettings,
    SiteChange,
    WholeAdapter,
    combine,
    completed,
    factor_length,
    layout_of_ranks,
    leading,
)
from fluvial.federation.sites import Site, Task
from fluvial.methods import METHODS
from fluvial.methods.fedpipe import tasks
from fluvial.methods.fedpipe.server import FedPipeServer
from fluvial.models.pool import ModelPool
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import merge, parse
from fluvial.runs.plan import plan as check
from fluvial.runs.run import Run
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Layout, Named, norm
from tests.oracle.test_fedpipe import EQUAL, Table, records
from tests.support.runs import run_table

pytestmark = pytest.mark.oracle

MODULES = {"a.q_proj": (7, 9), "b.down_proj": (12, 5)}
RANK = 4


def layout(rank: int = RANK) -> Layout:
    return Layout(
        tuple(
            entry
            for name, (rows, columns) in MODULES.items()
            for entry in (
                (f"{name}.lora_A.weight", (rank, columns)),
                (f"{name}.lora_B.weight", (rows, rank)),
            )
        )
    )


def drawn(seed: int, size: float = 1.0) -> Named:
    draw = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(shape, generator=draw) for name, shape in layout().shapes}


def product(tensors: Named, module: str) -> Tensor:
    b = tensors[f"{module}.lora_B.weight"].double()
    return b @ tensors[f"{module}.lora_A.weight"].double()


def true_change(received: Named, update: Named, module: str) -> Tensor:
    after = {name: tensor + update[name] for name, tensor in received.items() if name in update}
    return product(after, module) - product(received, module)


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix)
    best: Tensor = u[:, :rank] * s[:rank] @ v[:rank]
    return best


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.99])
def test_a_prefix_is_the_truncated_svd_of_the_change(share: float) -> None:
    received, update = drawn(1), drawn(2, 0.3)
    components = leading(received, update, share)
    sizes = []
    left = []

    for module in MODULES:
        change = true_change(received, update, module)
        name = f"{module}.lora_A.weight"
        rank = components[name].shape[0] if name in components else 0
        sent = product(components, module) if rank else torch.zeros_like(change)
        assert torch.allclose(sent, truncated(change, rank), atol=1e-5)
        values = torch.linalg.svdvals(change).square() / sum(MODULES[module])
        sizes += values[:rank].tolist()
        left += values[rank : 2 * RANK].tolist()

    # One order over all modules: nothing that was sent is worth less than what was left.
    assert min(sizes) >= max(left)
    numel = Layout.of(components).numel
    least = min(sum(shape) for shape in MODULES.values())
    assert numel <= max(share * layout().numel, 2 * least)
    assert layout_of_ranks(
        layout(),
        {m: completed(components, layout())[f"{m}.lora_A.weight"].shape[0] for m in MODULES},
    ) == Layout.of(components)


def test_nothing_changed_is_one_component_that_is_zero() -> None:
    zero = {name: torch.zeros(shape) for name, shape in layout().shapes}
    components = leading(drawn(1), zero, 0.5)
    assert len(components) == 2
    assert not any(tensor.any() for tensor in components.values())


def test_an_honest_update_is_at_least_as_long_as_its_components_say() -> None:
    received, update = drawn(1), drawn(2, 1e-3)
    components = leading(received, update, 0.9)
    assert 0 < factor_length(components, received) <= norm(update) * (1 + 1e-2)
    huge = {name: 1e3 * tensor for name, tensor in components.items()}
    assert factor_length(huge, received) > 100 * norm(update)


@pytest.mark.parametrize("mode", ["stack", "svd"])
@pytest.mark.parametrize("order", ["falling", "rising"])
def test_what_arrived_counts_with_the_weight_of_its_site(order: str, mode: str) -> None:
    """T = G + w_1 D_1 + w_2 first(D_2), densely, in whatever order a site sends its components; a
    module of which nothing arrived counts as unchanged by its site, so that the other one has no
    larger weight in it."""
    whole = WholeAdapter(drawn(1))
    changes = {"east": SiteChange.of(drawn(1), drawn(2, 0.3), 3)}
    update = drawn(3, 0.3)
    update = {name: (1e-3 if "a.q" in name else 1.0) * each for name, each in update.items()}
    components = leading(drawn(1), update, 0.4)
    assert {tensor.shape for tensor in components.values()} == {(3, 5), (12, 3)}
    assert not any("a.q" in name for name in components)
    if order == "rising":
        components = {
            name: tensor.flip(0 if ".lora_A." in name else 1) for name, tensor in components.items()
        }
    changes["west"] = SiteChange.of_components(completed(components, layout()), 1)

    settings = AggregationSettings(mode=cast(Any, mode), residual_rank=20)
    fresh = {k: v if ".lora_A." in k else torch.zeros_like(v) for k, v in drawn(9).items()}
    combined = combine(whole, changes, settings, fresh=fresh).whole
    for module in MODULES:
        target = product(drawn(1), module)
        target = target + 0.75 * true_change(drawn(1), drawn(2, 0.3), module)
        if f"{module}.lora_A.weight" in components:
            target = target + 0.25 * product(components, module)
        result = combined.product(module)
        assert torch.allclose(result.left @ result.right, target, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, codec in CODECS.items() if not codec.learned])
def test_every_codec_that_learns_nothing_codes_components_or_says_that_it_cannot(name: str) -> None:
    components = leading(drawn(1), drawn(2, 0.3), 0.9)
    coded = 0
    for table in ({}, {"rate": 2}):
        try:
            settings = read_settings({"name": name} | table)
        except WireError:  # it has no rate
            continue
        if can_code(settings, Layout.of(components)):
            codec = build(settings, Layout.of(components))
            decoded = codec.decode(codec.encode(components, seed=1, round=2), round=2)
            assert Layout.of(decoded) == Layout.of(components)
            coded += 1
    assert coded


# -- through a run ---------------------------------------------------------------------------------

SLOW: Table = EQUAL | {
    "aggregation": {"mode": "svd"},
    "deadline_s": 1e6,
    "budgets": [{"site": site, "up_mbit_s": 0.1, "tokens_s": 1e3} for site in ("north", "south")],
}


def shares(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Leave time for this share of an update at every site with a slow link."""
    usual = tasks.Upload.share
    monkeypatch.setattr(
        tasks.Upload,
        "share",
        lambda self, seconds: share if self.whole_s > 1e-3 else usual(self, seconds),
    )


def test_time_for_all_is_the_whole_update_to_the_bit(run_config: Table, tmp_path: Path) -> None:
    """A deadline that is far away, a slow link, and no deadline at all."""
    prefix = run_table(run_config | {"method": SLOW}, tmp_path / "prefix")
    whole = run_table(run_config | {"method": SLOW | {"least_upload": 1.0}}, tmp_path / "whole")
    without = {key: value for key, value in SLOW.items() if key != "deadline_s"}
    free = run_table(run_config | {"method": without}, tmp_path / "free")

    assert prefix["adapter_sha256"] == whole["adapter_sha256"] == free["adapter_sha256"]
    assert prefix["bytes"]["by_kind"]["up train"] == free["bytes"]["by_kind"]["up train"]
    assert not any("sent_share" in record for record in records(tmp_path / "prefix"))


@pytest.mark.parametrize("codec", [{"name": "identity"}, {"name": "trellis", "rate": 8}])
def test_less_time_is_fewer_bytes_and_still_learns(
    codec: Table, run_config: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = {}
    for share in (1.0, 0.5, 0.2):
        shares(monkeypatch, share)
        folder = tmp_path / str(share)
        result = run_table(run_config | {"method": SLOW, "codec": codec}, folder)
        assert result["heldout"]["final"]["loss"] < result["heldout"]["base"]["loss"]
        last = records(folder)[-1]
        sent[share] = last["bytes"]["south"]["up train"]
        if share < 1:
            assert sorted(last["sent_share"]) == ["north", "south"]  # west has no slow link
            assert all(0 < each <= share for each in last["sent_share"].values())

    assert sent[1.0] > sent[0.5] > sent[0.2]


def test_a_codec_whose_rate_leaves_no_bytes_sends_more(
    run_config: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares(monkeypatch, 0.05)
    run_table(run_config | {"method": SLOW, "codec": {"name": "trellis"}}, tmp_path / "run")
    for record in records(tmp_path / "run"):
        assert record["sites"] == 3
        assert all(each > 0.05 for each in record["sent_share"].values())


def test_a_forged_prefix_is_the_sites_failure(
    run_config: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies: dict[str, Payload] = {}

    def train(site: Site, message: Payload) -> Payload:
        replies[site.name] = tasks.train(site, message)
        return replies[site.name]

    shares(monkeypatch, 0.4)
    monkeypatch.setitem(cast(dict[str, Task], METHODS["fedpipe"].tasks), "train", train)
    config = parse(run_config | {"rounds": 1, "method": SLOW}, "test")
    pool = ModelPool(config.model, config.adapter)
    with RunFolder(tmp_path / "run") as folder:
        run = Run(config, folder, pool, SiteTexts(config.data, pool.tokenizer, seed=config.seed))
        for _ in run.events():
            pass

    server = run.server
    assert isinstance(server, FedPipeServer)
    honest = replies["south"]
    counts = cast(list[int], honest.values["k"])
    update = server.shared.exchange.read(1, "south", honest).content[1]
    assert 0 < update.share <= 0.4

    first = next(place for place, count in enumerate(counts) if count)
    more = [*counts]
    more[first] += 1
    wrong: list[Any] = [None, 3, "1", {}, [], counts[1:], [*counts, 0], [0] * len(counts), more]
    wrong += [[value, *counts[1:]] for value in (-1, True, "1", 1.0, None, 10**9, 10**400)]
    for value in wrong:
        forged = Payload(honest.tensors, {**honest.values, "k": value})
        with pytest.raises(WireError):
            server.shared.exchange.read(1, "south", forged)

    # Components of a whole update's size, and those of a run that counts none.
    four = Payload(honest.tensors, {**honest.values, "k": [4] * len(counts)})
    with pytest.raises(WireError, match="where an update has"):
        server.shared.exchange.read(1, "south", four)
    rule = METHODS["fedavg"].server(parse(run_config, "test").method, run.context)
    with pytest.raises(WireError, match="not expected .'k'"):
        cast(Any, rule).shared.exchange.read(1, "south", honest)


def test_steps_end_in_time_for_the_least_share() -> None:
    upload = tasks.Upload(10.0, 0.25, 8.0)
    assert upload.training_s == 8.0
    assert upload.share(1.0) == 1.0
    assert upload.share(6.0) == 0.5
    assert upload.share(9.9) == 0.25
    assert tasks.Upload(None, 1.0, 0.0).share(100.0) == 1.0
    assert tasks.Upload(None, 1.0, 0.0).training_s is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"deadline_s": None}, "least_upload: without effect, because deadline_s is unset"),
        ({"aggregation": {"mode": "pad"}}, "method.least_upload=0.5: .*which count under"),
        ({"aggregation": {"target": "products"}}, "method.least_upload=0.5: .*which count under"),
        ({"budgets": []}, "method.least_upload: without effect.* no|neither"),
    ],
)
def test_a_share_that_cannot_count_is_refused(change: Table, words: str, run_config: Table) -> None:
    method = merge(SLOW | {"least_upload": 0.5}, change)
    if change.get("deadline_s", 1) is None:
        method.pop("deadline_s")
    with pytest.raises(ConfigError, match=words):
        check(parse(run_config | {"method": method}, "test"))
    feedback = {"codec": {"name": "int8", "error_feedback": True}}
    with pytest.raises(ConfigError, match="without error_feedback"):
        check(parse(run_config | {"method": SLOW | {"least_upload": 0.5}} | feedback, "test"))
