"""A slow line between a server and its sites, on one machine.

Server and sites run in network namespaces of their own, joined by TUN devices; a process between
them holds every IP packet back as a line of that rate and delay would, and drops some. So the
kernel's TCP at both ends sees the line, with its own windows, retransmissions and acknowledgements.
This stands in for `tc netem`, which not every kernel has (it needs CONFIG_NET_SCH_NETEM); queue and
order of loss, rate and delay are netem's: loss first, then a queue of 1,000 packets, then the rate,
then the delay, in each direction. Both ends use TCP Reno, which any namespace may choose (cubic
keeps to its rate on such lines, BBR hardly minds loss), and remember nothing of earlier connections
(`tcp_no_metrics_save`). A veth pair beside each line measures the same rounds without it.

Everything ends with its processes: namespaces and devices have no names outside.
"""

import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Setting:
    """Properties of a line: rate, delay and loss of the process between the namespaces."""

    mbit_s: float
    delay_ms: float
    """One way."""
    loss: float
    shared: bool = False
    """All sites on one line."""


QUEUE = 1000
"""Packets, as netem's limit."""


def carry(pairs: Sequence[tuple[int, int]]) -> None:
    """Carry packets between pairs of TUN devices until standard input ends; a line of JSON there is
    a new `Setting`."""
    over = {here: there for pair in pairs for here, there in (pair, pair[::-1])}
    lanes = {here: (here if one else -here - 1) for pair in pairs for one, here in enumerate(pair)}
    setting = Setting(1e4, 0.0, 0.0)
    chance = random.Random(5)
    free: dict[int, float] = {}
    waiting: dict[int, list[float]] = {}
    flying: list[tuple[float, int, int, bytes]] = []
    number = 0
    print("ready", flush=True)

    while True:
        now = time.monotonic()
        while flying and flying[0][0] <= now:
            _, _, there, packet = heapq.heappop(flying)
            os.write(there, packet)

        left = max(0.0, flying[0][0] - time.monotonic()) if flying else None
        ready, _, _ = select.select([0, *over], [], [], left)
        for here in ready:
            if here == 0:
                line = sys.stdin.readline()
                if not line:
                    return
                setting = Setting(**json.loads(line))
                continue

            packet = os.read(here, 65536)
            now = time.monotonic()
            up = lanes[here] >= 0
            lane = int(up) if setting.shared else lanes[here]
            queue = [leaves for leaves in waiting.get(lane, []) if leaves > now]
            waiting[lane] = queue

            if chance.random() < setting.loss or len(queue) >= QUEUE:
                continue

            free[lane] = max(now, free.get(lane, 0.0)) + 8 * len(packet) / (1e6 * setting.mbit_s)
            queue.append(free[lane])
            number += 1
            heapq.heappush(
                flying, (free[lane] + setting.delay_ms / 1e3, number, over[here], packet)
            )


_LIBC = ctypes.CDLL(None, use_errno=True)
_NEWNET = 0x40000000


def _own_namespace() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _enter(namespace: int) -> None:
    if _LIBC.setns(namespace, _NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


@contextmanager
def inside(namespace: int) -> Iterator[None]:
    """Put all that this thread opens and starts into that network namespace."""
    home = _own_namespace()
    _enter(namespace)

    try:
        yield
    finally:
        _enter(home)
        os.close(home)


def new_namespace() -> int:
    """Return a network namespace that lasts as long as this file descriptor, or a process in it."""
    home = _own_namespace()
    if _LIBC.unshare(_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare: a network namespace needs CAP_SYS_ADMIN")

    made = _own_namespace()
    try:
        _ip("link set lo up")
        Path("/proc/sys/net/ipv4/tcp_congestion_control").write_text("reno")
        Path("/proc/sys/net/ipv4/tcp_no_metrics_save").write_text("1")
    finally:
        _enter(home)
        os.close(home)

    return made


def _ip(*commands: str) -> None:
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True)


def _tun(name: str) -> int:
    """Return a TUN device of this namespace, as the file whose packets it carries."""
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(
        device, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x0001 | 0x1000)
    )  # TUNSETIFF, TUN, NO_PI

    return device


SERVER = "10.99.0.1"


class Lines:
    """The server's namespace, one for each site, and a line and a veth pair between them."""

    def __init__(self, sites: int) -> None:
        self.server, self.sites = new_namespace(), [new_namespace() for _ in range(sites)]
        pairs = []
        with inside(self.server):
            _ip(f"addr add {SERVER}/32 dev lo")
        for number, site in enumerate(self.sites, 1):
            with inside(self.server):
                here = _tun(f"line{number}")
                _ip(f"link add straight{number} type veth peer name far{number}")
                # By a file of this process, since the namespace has no name.
                _ip(f"link set far{number} netns /proc/{os.getpid()}/fd/{site}")
                _ip(f"link set line{number} up", f"link set straight{number} up")

            with inside(site):
                there = _tun("line")
                _ip(
                    "link set line up",
                    f"link set far{number} up",
                    f"addr add {_address(number)}/32 dev lo",
                )

            pairs.append((here, there))

        devices = [device for pair in pairs for device in pair]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.engine.line", *map(str, devices)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=devices,
            text=True,
            start_new_session=True,
        )
        for device in devices:
            os.close(device)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            self.close()
            raise RuntimeError("the process that carries packets has ended")

    def use(self, setting: Setting | None) -> None:
        """Send what follows over lines of that kind, or past them."""
        for number, site in enumerate(self.sites, 1):
            device, far = (
                (f"straight{number}", f"far{number}")
                if setting is None
                else (f"line{number}", "line")
            )
            with inside(self.server):
                _ip(f"route replace {_address(number)}/32 dev {device} src {SERVER}")
            with inside(site):
                _ip(f"route replace {SERVER}/32 dev {far} src {_address(number)}")

        if setting is not None:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(asdict(setting)) + "\n")
            self._process.stdin.flush()
            time.sleep(0.2)

    def close(self) -> None:
        """End the process between the namespaces."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

        for namespace in (self.server, *self.sites):
            os.close(namespace)

    def tried(self, size: int = 4_000_000) -> dict[str, float | None]:
        """Round trip of a connection's start, ms, and the rate at which `size` bytes went up,
        Mbit/s, at one site."""
        with inside(self.server):
            listener = socket.create_server((SERVER, 0))
        taken: list[float] = []

        def take() -> None:
            peer, _ = listener.accept()
            with peer:
                got = 0
                first = 0.0
                while data := peer.recv(65536):
                    got = got + len(data)
                    first = first or time.monotonic()

                taken.append(8e-6 * got / (time.monotonic() - first))

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        with inside(self.sites[0]):
            sender = socket.socket()
        since = time.monotonic()
        with listener, sender:
            sender.settimeout(60)
            sender.connect(listener.getsockname())
            rtt_ms = 1e3 * (time.monotonic() - since)
            sender.sendall(bytes(size))
            sender.shutdown(socket.SHUT_WR)
            thread.join(60)

        return {"rtt_ms": rtt_ms, "mbit_s": taken[0] if taken else None}


def _address(site: int) -> str:
    return f"10.99.{site}.2"


def possible() -> str | None:
    """Why this machine cannot do it, or None."""
    try:
        os.close(new_namespace())
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces with TUN devices here: {error}"

    return None


if __name__ == "__main__":
    given = list(map(int, sys.argv[1:]))
    carry(list(zip(given[::2], given[1::2], strict=True)))
