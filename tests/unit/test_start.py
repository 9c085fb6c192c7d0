"""What a command imports, and what it says first: torch takes seconds to load."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "peft", "scipy", "numba", "pandas", "bitsandbytes", "flwr")
CODE = f"""
import json, sys
from fluvial.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["fluvial", *words]
    try:
        main()
    except SystemExit:
        pass
    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr, flush=True)
"""


def called(*commands: tuple[object, ...], **environment: str) -> subprocess.CompletedProcess[str]:
    """The output of commands in one process; after each, the list of its heavy imports."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    return subprocess.run(
        [sys.executable, "-c", CODE, words],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "400", **environment},
    )


def test_what_needs_no_model_is_refused_without_torch(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('[method]\nname = "fedavg"\n')
    used = tmp_path / "used"
    used.mkdir()
    (used / "config.json").write_text("{}")
    run = ("run", config, "--out")
    expected = {
        (*run, used): "already holds a run; use --resume",
        (*run, tmp_path / "none", "--resume"): "holds no run to resume",
        ("check", tmp_path / "none.toml"): "there is no configuration file",
        ("run", "recipe:none"): "recipe 'none': unknown; the recipes are",
        ("plan", config): "method.name='fedavg' without [budget]: nothing is planned",
        ("show", tmp_path): "holds no run",
    }
    if find_spec("flwr"):
        expected |= {
            ("submit", config, "--server", tmp_path): "holds no server",
            ("status", tmp_path): "holds no server",
            ("site", "register", tmp_path, tmp_path / "x.pub"): "there is no public key",
        }
    said = called(*expected).stderr.splitlines()
    lines = [
        line
        for line in said
        if line not in {"[]", "asking the server ...", "registering the site ..."}
    ]
    assert len(lines) == len(expected), said
    for told, line in zip(expected.values(), lines, strict=True):
        assert told in line
    assert said.count("[]") == len(expected)


def test_folders_of_a_deployment_are_made_without_torch(tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="needs the extra 'flower'")
    server, site = tmp_path / "server", tmp_path / "site"
    ends = ("--ca", server / "ca.crt", "--channel-key", server / "channel.pub")
    said = called(("server", "init", server), ("site", "init", site, "--name", "north", *ends))
    assert said.stderr.splitlines() == ["[]", "[]"]
    assert (site / "site.toml").exists()


def test_a_command_says_what_it_does_before_it_loads_torch(tmp_path: Path) -> None:
    """torch ends the command here; nothing but JSON goes to standard output."""
    (tmp_path / "torch.py").write_text("raise SystemExit")
    config = tmp_path / "run.toml"
    config.write_text("rounds = 2\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    said = called(("check", config, "--format", "json"), PYTHONPATH=path)
    assert said.stderr.splitlines() == ["reading the configuration ...", "[]"]
    assert not said.stdout
