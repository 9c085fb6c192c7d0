"""Runs of FedCyBGD on a model of four layers, and plain loops to compare them with."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
from torch import nn

import fluvial.training.stepper as training
from fluvial.codecs import Codec, build
from fluvial.data import Example, SiteTexts
from fluvial.federation.sites import Site, Task
from fluvial.methods import METHODS
from fluvial.methods.fedcybgd.blocks import Partition, partition
from fluvial.methods.fedcybgd.server import FedCyBgdServer
from fluvial.methods.shared import SharedModelServer
from fluvial.models.pool import ModelPool
from fluvial.models.states import initial_state
from fluvial.models.tuning import tuned_parameters
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.run import Run
from fluvial.seeds import generator
from fluvial.training.config import TrainConfig
from fluvial.training.evaluate import heldout
from fluvial.training.train import train
from fluvial.wire.payload import Payload, frame_payload, payload_frame
from fluvial.wire.tensors import Named, moved, subtract
from tests.support.models import four_layers

VISIT: Any = import_module(
    "fluvial.methods.fedcybgd.visit"
)  # the package's attribute of that name is the task

SITES = "abcdefgh"

LAYERS = 4

VALUES = 9280
"""Of a layer, without two norms a multiple of 64."""

ONCE = {"max_steps": 1}

UNWATCHED = {"gate": {"threshold": 0}}

FORMS: dict[str, dict[str, Any]] = {
    "full": {"download": {"form": "full"}},
    "cache": {"download": {"form": "cache"}},
    "cache, disk": {"download": {"form": "cache"}, "hold": "disk"},
    "whole proxy": {"download": {"form": "proxy", "kept": 1.0, "drop": 0.0}, **UNWATCHED},
    "proxy": {"download": {"form": "proxy", "kept": 0.6, "drop": 0.0}, **UNWATCHED},
    "stale-subset": {"download": {"form": "stale-subset"}, **UNWATCHED},
    "low-bit": {"download": {"form": "low-bit"}, **UNWATCHED},
    "low-bit, disk": {"download": {"form": "low-bit"}, "hold": "disk", **UNWATCHED},
}

EXACT = ("cache", "cache, disk", "whole proxy")
"""Beside the plain full download."""


@dataclass
class Played:
    """A run after its last round, before anything is measured or exported."""

    run: Run
    rounds: list[dict[str, Any]]
    states: list[Named]
    """After each round."""
    folder: Path

    @property
    def server(self) -> FedCyBgdServer:
        return cast(FedCyBgdServer, self.run.server)

    @property
    def state(self) -> Named:
        return self.states[-1]

    @property
    def parts(self) -> Partition:
        return self.server.parts


@dataclass
class Stage:
    """Runs on a model of four layers and up to eight sites of unequal size; what they share is
    loaded once."""

    model: Path
    text: Path
    root: Path
    pools: dict[Any, ModelPool] = field(default_factory=dict)
    read: dict[Any, SiteTexts] = field(default_factory=dict)
    played: int = 0

    def table(
        self, sites: int = LAYERS, method: Mapping[str, Any] | None = None, **changes: Any
    ) -> dict[str, Any]:
        """A configuration: `sites` of them, one step after another, nothing lost in the uplink."""
        base: dict[str, Any] = {
            "seed": 1,
            "rounds": 2,
            "tune": "full",
            "model": {"name_or_path": str(self.model), "device": "cpu"},
            "data": {
                "source": str(self.text),
                "public_source": str(self.text),
                "form": "text",
                "max_length": 32,
                "heldout_share": 0.2,
                "partition": {"by": "column", "column": "client", "largest": sites},
            },
            "train": {"learning_rate": 3e-3, "max_steps": 2, "per_device_train_batch_size": 4},
            "method": {"name": "fedcybgd", "order": "ascending", **(method or {})},
            "codec": {"name": "identity"},
            "fleet": {
                "workers": 1,
                "max_update_growth": 1e9,
            },  # what a guard does with a long step is looked at here
            "evaluate": {"sample_tokens": 2},
        }
        base["train"] |= changes.pop("train", {})
        base["model"] |= changes.pop("model", {})

        return base | changes

    def pool(self, config: RunConfig) -> ModelPool:
        key = (config.model.model_dump_json(), config.tuned)
        if key not in self.pools:
            self.pools[key] = ModelPool(config.model, config.adapter)
        return self.pools[key]

    def texts(self, config: RunConfig) -> SiteTexts:
        key = (config.data.model_dump_json(), config.seed)
        if key not in self.read:
            self.read[key] = SiteTexts(config.data, self.pool(config).tokenizer, seed=config.seed)
        return self.read[key]

    def folder(self) -> Path:
        self.played += 1
        return self.root / str(self.played)

    def play(
        self,
        table: dict[str, Any],
        folder: Path | None = None,
        *,
        after: Callable[[Path], None] | None = None,
        to: Literal["last round", "result"] = "last round",
    ) -> Played:
        """All rounds of a run, or those that are left of the one in `folder`; `after` sees the
        folder each round."""
        config = parse(table, "test")
        rounds = list[dict[str, Any]]()
        states = list[Named]()
        folder = folder or self.folder()

        with RunFolder(folder) as opened:
            run = Run(config, opened, self.pool(config), self.texts(config))
            for event in run.events():
                if event.kind != "round":
                    continue
                rounds.append(event.values)
                states.append(cast(SharedModelServer, run.server).model())
                if event.values["round"] == config.rounds and to == "last round":
                    break
                if after is not None:
                    after(folder)

        return Played(run, rounds, states, folder)

    def opened(self, table: dict[str, Any]) -> Run:
        """A run that has not begun."""
        config = parse(table, "test")
        return Run(config, RunFolder(self.folder()), self.pool(config), self.texts(config))

    def oracle(self, table: dict[str, Any]) -> "Oracle":
        config = parse(table, "test")
        return Oracle(config, self.pool(config), self.texts(config))

    def loss(self, table: dict[str, Any], state: Named) -> float:
        """Held-out loss over all sites."""
        oracle = self.oracle(table)
        examples = [each for site in oracle.sites for each in oracle.texts.load(site).heldout]

        with oracle.pool.model(state) as model:
            return heldout(model, examples, pad_token_id=0).loss


@dataclass
class Oracle:
    """Plain loops over the one training loop, on a whole model, with no message and no block beside
    the names."""

    config: RunConfig
    pool: ModelPool
    texts: SiteTexts

    @property
    def sites(self) -> Sequence[str]:
        return self.texts.names

    @property
    def start(self) -> Named:
        return initial_state(self.pool.layout, self.config.seed)

    def names(self, block: int) -> list[str]:
        """The tensors of a layer, or with -1 all."""
        return [name for name in self.pool.layout.names if block < 0 or f".layers.{block}." in name]

    def samples(self, site: str) -> int:
        return len(self.texts.load(site).train)

    def update(self, state: Named, block: int, round: int, site: str) -> Named:
        """What `site` changes in a block, trained from `state`: what fp32 keeps of the
        difference."""
        names = self.names(block)
        start = self.pool.weights({name: state[name] for name in names})

        with self.pool.model(state, trainable=names) as model:
            report = train(
                model,
                self.texts.load(site).train,
                self.config.train.in_round(round, self.config.rounds),
                pad_token_id=0,
                generator=generator(self.config.seed, "train", round, site),
                start=start,
            )

        return subtract(report.weights, start)

    def cyclic(self, block: Callable[[int, int], int]) -> Named:
        """Centralised block coordinate descent on the sites' data, in their order; `block(client,
        cycle)`."""
        state = self.start
        for cycle in range(self.config.rounds):
            for client, site in enumerate(self.sites):
                state = moved(state, self.update(state, block(client, cycle), cycle + 1, site))

        return state


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    root = tmp_path_factory.mktemp("fedcybgd")
    words = (
        "snow",
        "ice",
        "wind",
        "frost",
        "sun",
        "sand",
        "heat",
        "palm",
        "rain",
        "sea",
        "wave",
        "fog",
    )
    lines = []

    for place, site in enumerate(SITES):
        for number in range(10 + 2 * place):
            text = " ".join(
                words[(2 * place + number + shift) % 12] for shift in range(4 + number % 5)
            )
            lines.append(json.dumps({"client": site, "text": f"{number} {text}"}))

    (root / "text.jsonl").write_text("\n".join(lines))
    return Stage(four_layers(root / "model"), root / "text.jsonl", root / "runs")


def differ(left: Named, right: Named) -> set[str]:
    """The names of what is not the same, bit for bit."""
    assert left.keys() == right.keys()
    return {name for name in left if not torch.equal(left[name], right[name])}


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Callable[[Task], None]:
    """Put another task in the place of a visit."""

    def replace(other: Task) -> None:
        monkeypatch.setitem(cast(dict[str, Task], METHODS["fedcybgd"].tasks), "visit", other)

    return replace


def answering(change: Callable[[Named], Named], liar: str, *, since: int = 1) -> Task:
    """A visit after which one site, since a round, changes its update before it sends it."""

    def visit(site: Site, message: Payload) -> Payload:
        reply = VISIT.visit(site, message)
        if site.name != liar or message.value("round", int) < since:
            return cast(Payload, reply)
        codec = codec_of(site, message)
        frame = codec.encode(
            change(codec.decode(payload_frame(reply))), round=message.value("round", int)
        )
        return frame_payload(frame, **reply.values)

    return visit


def codec_of(site: Site, message: Payload, *, beside: int = 0) -> Codec:
    """The codec of the block that is trained, or of one beside it."""
    parts = partition(site.layout)
    return build(
        site.codec, parts.blocks[(message.value("block", int) + beside) % len(parts)].layout
    )


def whole(_client: int, _cycle: int) -> int:
    """Everything is one block."""
    return -1


def ascending(client: int, _cycle: int) -> int:
    return client % LAYERS


def descending(client: int, _cycle: int) -> int:
    return LAYERS - 1 - client % LAYERS


def latin(client: int, cycle: int) -> int:
    return (client + cycle) % LAYERS


LORA: dict[str, Any] = {
    "tune": "lora",
    "lora": {"r": 4, "lora_alpha": 16, "target_modules": "attention"},
}


@dataclass
class Seen:
    """One visit, as the training loop saw it."""

    model: nn.Module
    names: set[str]
    trained: set[str]
    changed: set[str] = field(default_factory=set)
    """Parameters and buffers that are not what they were."""
    graphs: dict[str, set[bool]] = field(default_factory=dict)
    """Whether what the embeddings, and each layer, gave required a gradient."""
    graded: list[set[str]] = field(default_factory=list)
    """Parameters with a gradient, before each step."""
    rates: list[float] = field(default_factory=list)
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    steps: int = 0
    before: Named = field(default_factory=dict)


def graphs_from(block: int) -> dict[str, set[bool]]:
    """Nothing below the block builds a graph, everything from the block on does."""
    return {"embeddings": {False}, **{str(layer): {layer >= block} for layer in range(LAYERS)}}


def everything(model: nn.Module) -> Named:
    """Parameters and buffers, each by our names."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {
        name.removeprefix("base_model.model.").replace(".default.", "."): tensor.detach().clone()
        for name, tensor in named
    }


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """Every visit from here on."""
    visits: list[Seen] = []
    make = training._optimizer
    take = training.Stepper.step

    def watched(
        model: nn.Module, examples: Sequence[Example], config: TrainConfig, **rest: Any
    ) -> Any:
        before = everything(model)
        trained = {
            name for name, parameter in tuned_parameters(model).items() if parameter.requires_grad
        }
        seen = Seen(model, set(before), trained, before=before)
        visits.append(seen)

        def note(place: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                first = output[0] if isinstance(output, tuple) else output
                seen.graphs.setdefault(place, set()).add(first.requires_grad)

            return hook

        stack = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
        places = {
            "embeddings": cast(Any, model).get_input_embeddings(),
            **dict(stack.named_children()),
        }
        hooks = [module.register_forward_hook(note(place)) for place, module in places.items()]
        report = train(model, examples, config, **rest)

        for hook in hooks:
            hook.remove()
        seen.steps = report.steps
        seen.changed = differ(everything(model), before)
        return report

    def optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
        made = make(parameters, config)
        visits[-1].optimizers.append(made)
        return made

    def step(stepper: training.Stepper, number: int) -> None:
        seen = visits[-1]
        seen.graded.append(
            {name for name, each in seen.model.named_parameters() if each.grad is not None}
        )
        take(stepper, number)
        seen.rates += {group["lr"] for group in seen.optimizers[-1].param_groups}

    monkeypatch.setattr(VISIT, "train", watched)
    monkeypatch.setattr(training, "_optimizer", optimizer)
    monkeypatch.setattr(training.Stepper, "step", step)

    return visits


def sent(played: Played, way: str, round: int = -1) -> list[int]:
    return [row[f"{way} visit"] for _, row in sorted(played.rounds[round]["bytes"].items())]
