"""The page in headless Chromium: no error, no request, no overflow, and values to hover."""

import http.server
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fluvial.report.page import page_of
from fluvial.storage.run_files import REFUSED, SETUP, read_run
from tests.unit.report.test_page_words import TASKS
from tests.unit.report.test_show import BLOCKS, config, cycles, gate, records, result, write
from tests.unit.report.test_site_plans import RECORD, plan

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
]
PROBE = """<iframe id="page" width="WIDTH" height="900" src="/page.html"></iframe><pre></pre>
<script>
document.getElementById("page").onload = event => {
  const view = event.target.contentWindow, page = view.document
  document.querySelector("pre").textContent = JSON.stringify({
    wide: page.documentElement.scrollWidth,
    text: page.body.innerText,
    requests: view.performance.getEntriesByType("resource").map(entry => entry.name),
    headings: [...page.querySelectorAll("h2")].map(entry => entry.textContent),
    charts: [...page.querySelectorAll("figure > svg")].map(svg => ({
      tips: svg.querySelectorAll(".v > .tip").length,
      outside: [...svg.querySelectorAll("text:not(.tip)")].filter(text => {
        const box = text.getBBox(), whole = svg.viewBox.baseVal
        return box.width && !text.hasAttribute("transform")
          && (box.x < -2 || box.x + box.width > whole.width + 2)
      }).map(text => text.textContent)})),
    hidden: [...page.querySelectorAll(".tip")].every(
      tip => view.getComputedStyle(tip).display == "none"),
    hints: [...page.querySelectorAll(".scroll, figure")].map(
      box => view.getComputedStyle(box).backgroundAttachment),
    scrolls: [...page.querySelectorAll("*")].filter(
      box => box.scrollWidth > box.clientWidth + 1 && !box.matches(".scroll, figure")
        && view.getComputedStyle(box).overflowX == "auto").length,
    shown: [...page.querySelectorAll(".tabs > .pair")].filter(
      pair => view.getComputedStyle(pair).display != "none").length,
  }) }</script>"""


def finished(folder: Path) -> None:
    config(folder, "cgfedllm")
    measured = [{"loss": 3.0, "exact_match": 0.25}, {"loss": 3.4, "exact_match": 0.125}]
    sites = ("asyncio", "[red]xml[/]")
    own = {sites[0]: dict(zip(sites, measured, strict=True)), sites[1]: {sites[0]: measured[1]}}
    more = {
        "samples": [{"prompt": "def f", "base": "x" * 300, "final": "(x)"}],
        "setup": {"snapshots": 24, "gate": gate([])},
        "tasks": TASKS,
        "cross_site": {"local": own, "federated": dict(zip(sites, measured, strict=True))},
    }
    ours = result("cgfedllm", "klt", 3.2345, 2200, 131200, **more)
    write(folder, records(2200, 131200, start=3.3, missing=True, codec=True), ours)
    fedavg = result("fedavg", "identity", 3.2011, 131300, 131200)
    write(folder / "compare" / "fedavg", records(131300, 131200, start=3.28), fedavg)


def blocks(folder: Path) -> None:
    config(folder, "fedcybgd")
    found = [
        {"loss": 3.0, "sites": 3, "seconds": 1.0, "bytes_up": 10, "bytes_down": 10, **record}
        for record in cycles(40)
    ]
    write(folder, found, result("fedcybgd", "int8", 3.1, 100, 200, setup=BLOCKS))


def plans(folder: Path) -> None:
    config(folder, "fedpipe")
    setup = {"plans": {"north": plan(), "south": plan(ranks={"q_proj": 32})}}
    write(folder, [RECORD], result("fedpipe", "int8", 3.1, 100, 200, setup=setup))


def leakage(folder: Path) -> None:
    config(folder, "flglm")
    rows = [
        {"attack": name, "accuracy": share, "rouge_1": 0.1, "rouge_2": 0.1, "rouge_l": 0.1}
        for name, share in (("exact causal search", 0.5), ("gradient matching", 0.9375))
    ]
    found = {"accuracy": 0.9, "sentence": "most", "attacks": rows, "texts": 4, "tokens": 64}
    noise = {"epsilon": 52.8, "sentence": "epsilon 52.8 for each hidden state; " + "text " * 60}
    ours = result("flglm", None, 3.1, 100, 200, leakage=found, noise=noise)
    write(folder, records(100, 200, start=3.3), ours)


def unfinished(folder: Path) -> None:
    config(folder, "fedavg")
    write(folder, records(131300, 131200, start=3.3)[:1], None)


def begun(folder: Path) -> None:
    """The set-up is done, and no round."""
    config(folder, "fedpipe")
    setup = {"gate": gate([]), "plans": {"north": plan(), "south": plan(ranks={"q_proj": 32})}}
    (folder / SETUP).write_text(json.dumps(setup))


def refused(folder: Path) -> None:
    config(folder, "cgfedllm")
    why = {"why": "codec 'klt' does not carry " + "a" * 200, "gate": gate(["A error >= 1"])}
    (folder / REFUSED).write_text(json.dumps(why))


KINDS = {
    "finished": (
        finished,
        ["Held-out loss, by model and by data", "Samples", "Missing replies", "Tasks of lm-eval"],
    ),
    "blocks": (blocks, ["Block schedule, by cycle"]),
    "plans": (plans, ["Plan against measured", "Rank of each weight by site"]),
    "leakage": (leakage, ["Tokens read, by attack", "Privacy"]),
    "unfinished": (unfinished, ["Loss"]),
    "begun": (begun, ["Errors at the codec gate", "Plan of each site"]),
    "refused": (refused, ["Errors at the codec gate"]),
}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which this machine serves it."""
    (tmp_path / "www").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = partial(Quiet, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / "www", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def opened(
    page: bytes, width: int, served: tuple[Path, str], profile: Path
) -> tuple[dict[str, Any], list[str]]:
    """What the probe finds in a page of this width, and the lines of the console."""
    assert CHROMIUM is not None
    www, address = served
    (www / "page.html").write_bytes(page)
    (www / "probe.html").write_text(PROBE.replace("WIDTH", str(width)))
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--window-size=1400,1000", "--virtual-time-budget=3000", "--enable-logging=stderr"]
    command += [f"--user-data-dir={profile}", f"{address}/probe.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    found = json.loads(re.search(r"<pre>(.*)</pre>", done.stdout, re.DOTALL)[1])  # type: ignore[index]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return found, [line for line in console if "favicon" not in line]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_opens_whole(
    kind: str, width: int, served: tuple[Path, str], tmp_path: Path
) -> None:
    make, headings = KINDS[kind]
    make(tmp_path / "run")
    page = page_of(read_run(tmp_path / "run"))
    found, console = opened(page, width, served, tmp_path / "profile")
    assert found["wide"] <= width
    assert "None" not in found["text"]
    assert found["requests"] == []
    assert {*headings} <= {*found["headings"]}
    assert found["charts"]
    assert all(chart["tips"] and not chart["outside"] for chart in found["charts"]), found["charts"]
    assert found["hidden"]
    assert {*found["hints"]} == {"local, local, scroll, scroll"}  # a shade where more can be seen
    assert found["scrolls"] == 0
    assert found["shown"] == (0 if kind in ("refused", "begun") else 1)
    assert console == []
