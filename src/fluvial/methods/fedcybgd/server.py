"""The server's half of FedCyBGD: cycles of visits, and the guards around them."""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cached_property, partial

import torch

from fluvial.codecs import build
from fluvial.data import Example
from fluvial.errors import GateError, WireError
from fluvial.exchange import ask_stale_again
from fluvial.federation.aggregate import WeightedLoss
from fluvial.federation.bounds import lower_heaviest, rms, too_long
from fluvial.federation.failures import Failure
from fluvial.federation.fleet import Fleet
from fluvial.federation.replies import read_counted
from fluvial.methods.fedcybgd.config import CentralCyclicConfig, Config, FedCyBgdConfig, partition
from fluvial.methods.fedcybgd.download import ProxyDownload
from fluvial.methods.fedcybgd.download.holder import EmptyHolder
from fluvial.methods.fedcybgd.download.receive import receive
from fluvial.methods.fedcybgd.download.send import Sender
from fluvial.methods.fedcybgd.guards import Judge, gradient
from fluvial.methods.fedcybgd.ledger import Commit, Ledger
from fluvial.methods.fedcybgd.proxy import Anatomy, Manifest, Scores, measure, plan_proxy
from fluvial.methods.fedcybgd.schedule import assignment, groups
from fluvial.methods.fedcybgd.visit import borrow
from fluvial.methods.fedcybgd.visits import Answer, Visit, conflicts, record
from fluvial.methods.interface import Context, Metrics
from fluvial.methods.shared import SharedModelServer
from fluvial.models.states import initial_state
from fluvial.seeds import generator
from fluvial.wire.payload import Payload, Value, join, payload_frame, split
from fluvial.wire.tensors import Named, cosine, norm

logger = logging.getLogger(__name__)

REMEMBERED = 64
"""Updates that a further one is compared with, since most groups of visits have one site."""
CALIBRATION = 32
"""Sequences of public text that layers and neurons are scored on."""


def _difference(now: Named, before: Named) -> Named:
    """Return now - before of the tensors that were replaced; the others are the same ones."""
    return {
        name: tensor - before[name] for name, tensor in now.items() if tensor is not before[name]
    }


class FedCyBgdServer(SharedModelServer):
    """Keeps the blocks, and which site holds which version of them."""

    def __init__(self, config: Config, context: Context) -> None:
        self.pooled = isinstance(config, CentralCyclicConfig)
        self.config = (
            config
            if isinstance(config, FedCyBgdConfig)
            else FedCyBgdConfig(download=config.download)
        )
        self.context = context
        self.order = config.order
        self.parts = partition(config, context.layout)
        self.codecs = [build(context.codec, block.layout) for block in self.parts.blocks]
        self.ledger = Ledger(self.parts, self.codecs, initial_state(context.layout, context.seed))
        self.lengths: list[float] = []
        """Root mean squares of the newest updates that counted, in the order of their visits."""
        self.sender = Sender(
            self.config.download, self.ledger, context.seed, context.open_pool, self._cut
        )

    # -- set-up -----------------------------------------------------------------------------------

    def setup(self, fleet: Fleet) -> Metrics:  # noqa: ARG002 - sites are asked nothing
        """Measure what a compressed download leaves of the gradients; raises `GateError` where that
        is too little."""
        report: Metrics = {
            "blocks": [{"name": block.name, "values": block.numel} for block in self.parts.blocks]
        }
        if not self.config.gated:
            return report

        cosines = {
            block.name: self._cosine(index, "0/setup")
            for index, block in enumerate(self.parts.blocks)
        }
        worst = min(
            cosines, key=lambda name: cosines[name] if math.isfinite(cosines[name]) else -math.inf
        )
        if not cosines[worst] >= self.config.gate.threshold:  # so that nan is refused
            raise GateError(
                f"method.download.form={self.config.download.form!r}: through it the gradient of "
                f"{worst!r} has cosine {cosines[worst]:.3f} to the exact one, "
                f"method.gate.threshold is {self.config.gate.threshold:g}; send more of the model, "
                "or form = 'cache'. All: "
                + ", ".join(f"{name} {value:.3f}" for name, value in cosines.items()),
                {},
            )

        return {**report, "gradient_cosines": cosines}

    @cached_property
    def _public(self) -> list[Example]:
        return [example for examples in self.context.public().values() for example in examples]

    @cached_property
    def _judge(self) -> Judge:
        accept = self.config.accept
        return Judge(accept, self.context.open_pool(), self._sample("accept", accept.examples))

    def _sample(self, purpose: str, count: int) -> list[Example]:
        order = generator(self.context.seed, "public", purpose)
        places = torch.randperm(len(self._public), generator=order).tolist()
        return [self._public[place] for place in places[:count]]

    def _cut(self, index: int, visit: str) -> Manifest:
        """Return the proxy of a visit."""
        config = self.config.download
        assert isinstance(config, ProxyDownload)
        layers = self.parts.blocks[index].layers

        return plan_proxy(
            self._scores,
            self._anatomy,
            trained=layers,
            settings=config,
            seed=self.context.seed,
            visit=visit,
        )

    @cached_property
    def _anatomy(self) -> Anatomy:
        config = self.config.download
        assert isinstance(config, ProxyDownload)
        return Anatomy.of(self.context.open_pool().blank(), config.prune)

    @cached_property
    def _scores(self) -> Scores:
        """Scores of the base model on public text, so that a resumed run computes the same."""
        config = self.config.download
        assert isinstance(config, ProxyDownload)
        pool = self.context.open_pool()
        with pool.model(pool.base_state()) as model:
            return measure(
                model,
                self._anatomy,
                self._sample("scores", CALIBRATION),
                pad_token_id=pool.tokenizer.pad_token_id,
                moments=config.correction != "none",
            )

    def _cosine(self, index: int, visit: str) -> float:
        """Return the cosine of a block's gradient through the download to the exact one."""
        pool = self.context.open_pool()
        examples = self._sample("gate", self.config.gate.examples)
        pad = pool.tokenizer.pad_token_id
        names = self.parts.blocks[index].layout.names
        message = self.sender.message("", index, visit, {})
        nobody = EmptyHolder(pool, self.context.seed)
        received = receive(
            self.config.download, nobody, message, self.parts, codec=self.context.codec
        )
        assert received is not None, "everything was sent"

        with pool.model(self.ledger.state) as model:
            exact = gradient(model, names, examples, pad)
        with borrow(pool, received) as model:
            return cosine(exact, gradient(model, names, examples, pad))

    # -- a cycle ----------------------------------------------------------------------------------

    def round(self, number: int, fleet: Fleet) -> Metrics:
        """Run one cycle: group after group of visits, each block moved before the next group is
        asked."""
        loss = WeightedLoss()
        start = self.ledger.state
        visits: list[Metrics] = []
        disputes: list[Metrics] = []
        clipped: list[Metrics] = []
        last: dict[int, Answer] = {}
        metrics: Metrics = {}
        cycle = self._groups(number, fleet.sites)

        if self.config.gated:
            first = cycle[0][0]
            metrics["gradient_cosine"] = self._cosine(first.block, first.name)

        for group in cycle:
            answers = self._ask(number, fleet, group)
            for block in dict.fromkeys(visit.block for visit in group):
                block_answers = [answer for answer in answers if answer.visit.block == block]
                if not block_answers:
                    continue

                name = self.parts.blocks[block].name
                disputes += conflicts(
                    name, block_answers, last.get(block), merging=self.config.merging
                )
                weights = {answer.visit.site: answer.samples for answer in block_answers}
                if "max_weight_share" in self.config.bounds:
                    most = fleet.config.max_weight_share
                    clipped += lower_heaviest(weights, most, number)

                share = self._merge(block, block_answers, weights)
                last[block] = block_answers[-1]

                for answer in block_answers:
                    loss.add(answer.loss, weights[answer.visit.site])
                    overwritten = (
                        self.config.merging == "overwrite" and answer is not block_answers[-1]
                    )
                    visits.append(record(answer, name, 0.0 if overwritten else share))

        asked = sum(map(len, cycle))
        fleet.require_quorum("visit", number, answered=len(visits), asked=asked)
        return {
            "loss": loss.mean(),
            "sites": len({visit["site"] for visit in visits}),
            "update_norm": norm(_difference(self.ledger.state, start)),
            **metrics,
            "visits": visits,
            "conflicts": disputes,
            **({"clipped": clipped} if clipped else {}),
        }

    def _groups(self, number: int, sites: Sequence[str]) -> list[list[Visit]]:
        """Return the visits of a cycle, group by group."""
        blocks = len(self.parts)
        clients = blocks if self.pooled else len(sites)
        assigned = assignment(
            self.order, clients=clients, blocks=blocks, cycle=number - 1, seed=self.context.seed
        )
        together = self.config.merging != "sequential"

        return [
            [
                Visit(f"{number}/{client}", sites[client % len(sites)], assigned[client])
                for client in group
            ]
            for group in groups(assigned, parallel=self.config.parallel, together=together)
        ]

    def _ask(self, number: int, fleet: Fleet, group: Sequence[Visit]) -> list[Answer]:
        """Ask the sites of a group and return the answers in the order of its visits; a site
        that cannot follow is sent everything, once."""
        asked: dict[str, Visit] = {}
        answers = dict[str, Answer]()
        lengths = dict[str, float]()

        def messages(sites: Sequence[str]) -> dict[str, Payload]:
            asked.clear()
            asked.update((visit.name, visit) for visit in group if visit.site in sites)
            values = self._values(number)
            return {
                visit.site: self.sender.message(visit.site, visit.block, visit.name, values)
                for visit in asked.values()
            }

        def forget(sites: Sequence[str]) -> None:
            for site in sites:
                self.sender.forget(site)

        for site, answer in ask_stale_again(
            fleet,
            "visit",
            [visit.site for visit in group],
            round=number,
            messages=messages,
            read=partial(self._read, number, asked),
            forget=forget,
        ):
            if answer.visit.site != site:
                logger.warning("site %s answered for %s; dropped", site, answer.visit.site)
                self.sender.forget(site)
                continue

            length = rms(answer.update)
            reason = too_long(length, self.lengths, fleet.config.max_update_growth)
            if reason is not None:
                fleet.reject(Failure(site, number, "visit", reason, 0))
                self.sender.forget(site)
                continue

            self.sender.acknowledge(site)
            if self.ledger.claim(answer.visit.name, number):
                answers[answer.visit.name] = answer
                lengths[answer.visit.name] = length

        ordered = [answers[visit.name] for visit in group if visit.name in answers]
        self.lengths = [*self.lengths, *(lengths[answer.visit.name] for answer in ordered)][
            -REMEMBERED:
        ]
        return ordered

    def _values(self, number: int) -> dict[str, Value]:
        """Return the values of a message beside the model: round, visits that share the steps."""
        return {"round": number, "visits": len(self.parts) if self.pooled else 1}

    def _read(self, number: int, asked: Mapping[str, Visit], _site: str, reply: Payload) -> Answer:
        name = reply.value("visit", str)
        if name not in asked:
            raise WireError(f"visit: answer to {name!r:.40}, which was not asked")

        visit = asked[name]
        decode = partial(self.codecs[visit.block].decode, round=number)
        update, samples, loss = read_counted(reply, decode, self.context.train, extra=("visit",))

        return Answer(visit, payload_frame(reply), update, samples, loss)

    def _merge(self, block: int, answers: Sequence[Answer], weight_of: Mapping[str, int]) -> float:
        """Move a block by what was sent for it, with the weight of each site; return the share of
        the step that was taken, 0 if none."""
        if self.config.merging == "overwrite":
            answers = answers[-1:]

        frames = tuple(answer.frame for answer in answers)
        weights = tuple(
            weight_of[answer.visit.site] if self.config.weighting == "samples" else 1
            for answer in answers
        )

        def step(share: float) -> Commit:
            return Commit(self.config.damping * share, frames, weights)

        share = 1.0
        if self.config.accept.on == "public loss":
            share, _, _ = self._judge.share(
                self.ledger.state, lambda share: self.ledger.moved(block, step(share))
            )

        if share > 0:
            self.ledger.commit(block, step(share))

        return share

    # -- what it is and keeps ---------------------------------------------------------------------

    def model(self) -> Named:
        """Return the server's own store, never what a site saw."""
        return self.ledger.state

    def state(self) -> Payload:
        """Return the blocks, commits, and who holds what."""
        lengths: dict[str, Value] = {"lengths": [*self.lengths]}
        return join(
            {
                "ledger": self.ledger.save(),
                "sender": Payload(values=self.sender.save()),
                "bounds": Payload(values=lengths),
            }
        )

    def restore(self, state: Payload) -> None:
        """See `state`."""
        parts = split(state, ("ledger", "sender", "bounds"))
        self.lengths = parts["bounds"].value("lengths", list)
        self.ledger.restore(parts["ledger"])
        self.sender.restore(parts["sender"].values)
