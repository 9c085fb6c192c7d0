"""A server of FedCyBGD whose blocks have moved, and its sites."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from fluvial.codecs import CodecSettings, build
from fluvial.codecs.quantise import Int8Settings
from fluvial.data import Example
from fluvial.federation.sites import Site
from fluvial.federation.store import StateStore
from fluvial.methods.fedcybgd.blocks import Partition, partition
from fluvial.methods.fedcybgd.download import DownloadConfig
from fluvial.methods.fedcybgd.download.holder import Received
from fluvial.methods.fedcybgd.download.receive import receive
from fluvial.methods.fedcybgd.download.send import Sender
from fluvial.methods.fedcybgd.ledger import Commit, Ledger
from fluvial.methods.fedcybgd.proxy import Anatomy, Manifest, measure, plan_proxy
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.states import initial_state
from fluvial.models.targets import LoraSettings
from fluvial.models.weight_sources import MemorySource
from fluvial.seeds import generator
from fluvial.training.config import TrainConfig
from fluvial.wire.payload import Payload
from fluvial.wire.tensors import Named
from tests.support.models import four_layers

SEED = 3

FORMS: dict[str, dict[str, Any]] = {
    "full": {"form": "full"},
    "proxy": {"form": "proxy", "kept": 0.5, "prune": "neurons and heads"},
    "whole proxy": {"form": "proxy", "kept": 1.0, "drop": 0.0},
    "stale-subset": {"form": "stale-subset", "share": 0.5},
    "low-bit": {"form": "low-bit"},
    "cache": {"form": "cache"},
}

EXACT = ("full", "whole proxy", "cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return four_layers(tmp_path_factory.mktemp("four_layers"))


@pytest.fixture(scope="module")
def pools(folder: Path) -> Callable[[str], ModelPool]:
    """Models by what is tuned, "full" or "lora", or by the type of all weights."""
    made: dict[str, ModelPool] = {}

    def get(kind: str) -> ModelPool:
        if kind not in made:
            dtype = {"full": "float32", "lora": "float32"}.get(kind, kind)
            config = ModelConfig.model_validate(
                {"name_or_path": str(folder), "device": "cpu", "dtype": dtype}
            )
            made[kind] = ModelPool(config, LoraSettings(r=4) if kind == "lora" else None)

        return made[kind]

    return get


@dataclass
class Scene:
    """A server whose blocks have moved, and its sites."""

    pool: ModelPool
    download: Any
    codec: CodecSettings
    store: StateStore
    parts: Partition = field(init=False)
    ledger: Ledger = field(init=False)
    sender: Sender = field(init=False)
    visits: int = 0

    def __post_init__(self) -> None:
        self.parts = partition(self.pool.layout)
        codecs = [build(self.codec, block.layout) for block in self.parts.blocks]
        self.ledger = Ledger(self.parts, codecs, initial_state(self.pool.layout, SEED))
        self.sender = Sender(self.download, self.ledger, SEED, lambda: self.pool, self.plan)

    def plan(self, index: int, visit: str) -> Manifest:
        anatomy = Anatomy.of(self.pool.blank(), self.download.prune)
        examples = [Example(ids, ids) for ids in ([1, 5, 9, 12, 7], [1, 44, 3, 80])]
        with self.pool.model(self.pool.base_state()) as model:
            scores = measure(model, anatomy, examples, pad_token_id=0)
        layers = self.parts.blocks[index].layers
        return plan_proxy(
            scores, anatomy, trained=layers, settings=self.download, seed=SEED, visit=visit
        )

    def move(self, *blocks: int, size: float = 1e-3) -> None:
        """One commit of one site to each of `blocks`."""
        for index in blocks:
            self.ledger.commit(index, commit_of(self.ledger, index, size=size))

    def site(self, name: str = "a") -> Site:
        data: Any = None
        return Site(
            name=name,
            seed=SEED,
            pool=self.pool,
            load=data,
            train=TrainConfig(),
            codec=self.codec,
            method=None,
            downlink=None,
            store=self.store,
            rounds=9,
        )

    def send(self, index: int, name: str = "a") -> Payload:
        """The next message to a site, as it comes out of the wire."""
        self.visits += 1
        message = self.sender.message(name, index, f"1/{self.visits}", {"round": 1, "visits": 1})

        return Payload.from_bytes(message.to_bytes())

    def read(self, message: Payload, site: Site) -> Received | None:
        return receive(self.download, site, message, self.parts, codec=self.codec)

    def visit(self, index: int, name: str = "a") -> Received:
        """One visit that succeeds: both ends remember it."""
        site = self.site(name)
        received = self.read(self.send(index, name), site)
        assert received is not None
        names = received.rest.names - received.start.keys()
        seen = Received(received.start, MemorySource(rest_of(received, names)), received.manifest)

        for slot, kept in site.kept.items():
            site.store.write(name, slot, kept, self.visits)
        self.sender.acknowledge(name)
        return seen

    @property
    def weights(self) -> Named:
        """What the server holds, absolute."""
        return self.pool.weights(self.ledger.state)


def commit_of(
    ledger: Ledger,
    index: int,
    *,
    size: float = 1e-3,
    factor: float = 1.0,
    weights: tuple[int, ...] = (5,),
) -> Commit:
    """Random updates of a block, one for each weight, drawn from the version that they make."""
    draw = generator(SEED, "commit", index, ledger.versions[index])
    codec = ledger.codecs[index]
    layout = ledger.parts.blocks[index].layout
    updates = [
        {name: size * torch.randn(shape, generator=draw) for name, shape in layout.shapes}
        for _ in weights
    ]

    return Commit(factor, tuple(codec.encode(update) for update in updates), weights)


@pytest.fixture
def scene(pools: Callable[[str], ModelPool]) -> Callable[..., Scene]:
    """Make a scene: the name of a form or its settings, what is tuned, how updates are coded, where
    sites keep."""

    def make(
        form: str | dict[str, Any],
        kind: str = "full",
        codec: CodecSettings | None = None,
        folder: Path | None = None,
    ) -> Scene:
        settings = FORMS[form] if isinstance(form, str) else form
        download: Any = TypeAdapter(DownloadConfig).validate_python(settings)
        return Scene(pools(kind), download, codec or Int8Settings(), StateStore(folder))

    return make


def equal(left: Named, right: Named) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


def shapes_of(tensors: Named) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def rest_of(received: Received, names: Any) -> Named:
    return {name: received.rest.get(name).clone() for name in names}
