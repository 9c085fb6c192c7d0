"""Rate of split steps over the live stream against steps without a network.

Both ends are in this process and share its cores, with one tensor thread each: the site works in a
thread, and its turns go over a gRPC stream on loopback with TLS and the secure channel, sealed as
in a deployment. A relay adds a delay where there is one. In each repetition all cases run one after
another; a figure is the median over repetitions of ratios within one repetition.
"""

import os
import queue
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from benchmarks.flglm.bed import LORA, standard_library
from benchmarks.report import Claim, Report, Row, show
from fluvial.data import SiteTexts
from fluvial.federation.config import FleetConfig
from fluvial.federation.fleet import Fleet
from fluvial.federation.in_process import local_fleet
from fluvial.federation.store import StateStore
from fluvial.flower import certificates
from fluvial.flower.stream.caller import StreamCaller
from fluvial.flower.stream.invitation import Invitation
from fluvial.flower.stream.listener import StreamListener
from fluvial.flower.stream.place import Place
from fluvial.flower.stream.seal import ServerSeal, SiteSeal, terms_of
from fluvial.methods.shared import SharedModelServer
from fluvial.models.pool import ModelPool
from fluvial.runs.checkpoint import RunFolder
from fluvial.runs.config import RunConfig, parse
from fluvial.runs.opening import site_of, tasks_of
from fluvial.runs.run import Run
from fluvial.wire.channel import Identity, ServerHandshake, SiteHandshake
from fluvial.wire.tensors import digest
from tests.support.stream import OverStream

MICRO_BATCHES = 4
"""Micro-batches of one sequence in an optimizer step."""
DELAY_MS = 20.0
"""Delay of a round trip over the slower line."""
BAR = 0.85
"""Bar for the rate over loopback with pipelining against the same without a network."""
LENGTHS = {"Qwen2.5-0.5B's shape, 4 layers": 512, "embedded model": 256}
"""Tokens of a sequence by model; the embedded model has a context of 256."""


@dataclass(frozen=True)
class Case:
    """A way in which turns travel."""

    line: str
    """"no network", "loopback", or "loopback, 20 ms"."""
    in_flight: int

    @property
    def delay_s(self) -> float:
        """Seconds of one way."""
        return DELAY_MS / 2e3 if "ms" in self.line else 0.0


CASES = [
    Case(line, in_flight)
    for line in ("no network", "loopback", f"loopback, {DELAY_MS:g} ms")
    for in_flight in (1, 2)
]


class Relay:
    """A port whose bytes reach another port some time later, in both directions."""

    def __init__(self, port: int, way_s: float) -> None:
        self._way_s = way_s
        self._far = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            far = socket.create_connection(("127.0.0.1", self._far))
            for source, sink in ((near, far), (far, near)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                late: queue.SimpleQueue[tuple[float, bytes] | None] = queue.SimpleQueue()
                threading.Thread(target=self._read, args=(source, late), daemon=True).start()
                threading.Thread(target=self._write, args=(sink, late), daemon=True).start()

    def _read(
        self, source: socket.socket, late: "queue.SimpleQueue[tuple[float, bytes] | None]"
    ) -> None:
        with suppress(OSError):
            while data := source.recv(2**18):
                late.put((time.monotonic() + self._way_s, data))
        late.put(None)

    def _write(
        self, sink: socket.socket, late: "queue.SimpleQueue[tuple[float, bytes] | None]"
    ) -> None:
        with suppress(OSError):
            while (entry := late.get()) is not None:
                due_s, data = entry
                time.sleep(max(0.0, due_s - time.monotonic()))
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


def random_model(folder: Path) -> None:
    """Write a random model with four of Qwen2.5-0.5B's layers, and the embedded tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(str(resources.files("fluvial") / "assets" / "tiny"))
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=4,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Bench:
    """One model, one site and the keys of both ends."""

    def __init__(self, folder: Path, model: dict[str, str], length: int, steps: int) -> None:
        certificates.make_authority(folder)
        certificates.make_server_certificate(folder, ["127.0.0.1"])
        self._place = Place(certificate=folder / "server.crt", key=folder / "server.key")
        self._authority = (folder / "ca.crt").read_bytes()
        self._site = Identity.generate()
        self._server = Identity.generate()
        self._source = standard_library(folder / "text.jsonl", records=60, characters=4000)
        self._model = model
        self._length = length
        self._steps = steps
        first = self._config(1)
        self._pool = ModelPool(first.model, first.adapter)
        self._texts = SiteTexts(first.data, self._pool.tokenizer, seed=0)

    def play(self, case: Case) -> tuple[float, str]:
        """Run one round; return its seconds and the digest of the weights after it."""
        config = self._config(case.in_flight)
        with (
            tempfile.TemporaryDirectory() as folder,
            RunFolder(Path(folder) / "run") as opened,
            self._fleet(config, case) as fleet,
        ):
            run = Run(config, opened, self._pool, self._texts)
            server = config.entry.server(config.method, run.context)
            assert isinstance(server, SharedModelServer)
            server.setup(fleet)
            started = time.perf_counter()
            server.round(1, fleet)
            return time.perf_counter() - started, digest(server.model())

    def _config(self, in_flight: int) -> RunConfig:
        table: dict[str, Any] = {
            "seed": 0,
            "rounds": 1,
            "model": {"dtype": "float32", "device": "cpu"} | self._model,
            "lora": LORA,
            "data": {
                "source": str(self._source),
                "form": "text",
                "max_length": self._length,
                "max_heldout": 4,
                "partition": {"by": "iid", "sites": 1},
            },
            "train": {
                "learning_rate": 1e-3,
                "max_steps": self._steps,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": MICRO_BATCHES,
            },
            "method": {
                "name": "flglm",
                "mode": "sequential",
                "in_flight": in_flight,
                "leakage": {"sites": "none"},
            },
        }
        return parse(table, "benchmark")

    @contextmanager
    def _fleet(self, config: RunConfig, case: Case) -> Iterator[Fleet]:
        open_site = partial(
            site_of, config, pool=self._pool, texts=self._texts, store=StateStore(None)
        )
        tasks = tasks_of(config)
        if case.line == "no network":
            yield local_fleet(self._texts.names, open_site, tasks, FleetConfig(workers=1))
            return

        with StreamListener(self._place) as listener:
            yield Fleet(
                OverStream(
                    self._texts.names,
                    open_site,
                    tasks,
                    listener,
                    caller=partial(self._caller, case.delay_s),
                    seal=self._seal,
                ),
                FleetConfig(),
            )

    def _caller(self, delay_s: float, site: str, invitation: Invitation) -> StreamCaller:
        terms = terms_of("run", invitation.token)
        seal = SiteSeal(SiteHandshake(self._site, self._server.public.fingerprint, site, terms))
        port = Relay(invitation.port, delay_s).port if delay_s else invitation.port
        return StreamCaller(invitation, "127.0.0.1", port, authority=self._authority, seal=seal)

    def _seal(self, site: str, token: bytes) -> ServerSeal:
        pins = {site: self._site.public}
        return ServerSeal(ServerHandshake(self._server, pins, terms_of("run", token)), site)


def measure(report: Report, *, steps: int, repeats: int) -> None:
    """Add rows and claims to `report`: optimizer steps of `MICRO_BATCHES` sequences."""
    torch.set_num_threads(1)
    for name, length in LENGTHS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            model = {}
            if "embedded" not in name:
                random_model(path / "model")
                model["name_or_path"] = str(path / "model")

            bench = Bench(path, model, length, steps)
            bench.play(CASES[0])  # which loads the model
            rounds: list[dict[Case, float]] = []
            digests = set()
            loads = []

            for _ in range(repeats):
                seconds = {}
                for case in CASES:
                    seconds[case], made = bench.play(case)
                    digests.add(made)
                rounds.append(seconds)
                loads.append(os.getloadavg()[0])

        assert len(digests) == 1, "every case must train the same weights"
        _add(report, name, rounds, loads, steps)


def _add(
    report: Report, name: str, rounds: list[dict[Case, float]], loads: list[float], steps: int
) -> None:
    rows: list[Row] = []
    for case in CASES:
        without = Case(CASES[0].line, case.in_flight)
        ratios = [seconds[without] / seconds[case] for seconds in rounds]
        taken = [seconds[case] for seconds in rounds]
        rows.append(
            {
                "model": name,
                "tokens": LENGTHS[name],
                "line": case.line,
                "in_flight": case.in_flight,
                "rate": steps * MICRO_BATCHES / median(taken),
                "of_no_network": median(ratios),
                "least": min(ratios),
                "most": max(ratios),
                "load": max(loads),
            }
        )
    report.rows += rows
    columns = {
        "line": "line",
        "in_flight": "micro-batches in flight",
        "rate": "sequences a second",
        "of_no_network": "of the rate without a network",
        "least": "least",
        "most": "most",
    }
    show(f"{name}, {LENGTHS[name]} tokens a sequence", columns, rows)
    (row,) = (row for row in rows if (row["line"], row["in_flight"]) == ("loopback", 2))
    claim = f"{name}: rate over loopback with TLS and channel, pipelined, of no network"
    report.claims.append(Claim(claim, row["of_no_network"], BAR, "at least"))
