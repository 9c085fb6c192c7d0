"""The public names of the package: exactly these, imported lazily, documented, and useful."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import fluvial
from examples.own_codec import OneScale, OneScaleSettings
from examples.own_method import MOMENTUM, MomentumServer
from fluvial.codecs import CODECS
from fluvial.codecs.base import OWN_CODES
from fluvial.errors import wrong_return
from fluvial.exchange import LocalUpdate, shared
from fluvial.methods import METHODS
from fluvial.methods.fedavg import terms
from fluvial.runs import own
from fluvial.wire.tensors import Named, scale
from tests.docs.test_docs import blocks
from tests.support import ROOT

PAGE = ROOT / "docs" / "python.md"
NAMES = {
    "Codec",
    "CodecSettings",
    "ConfigError",
    "Context",
    "Exchange",
    "Fleet",
    "FluvialError",
    "Layout",
    "Method",
    "MethodSettings",
    "Payload",
    "Plan",
    "Reader",
    "Result",
    "RunConfig",
    "Server",
    "Site",
    "Traits",
    "WeightedMean",
    "WireError",
    "check",
    "load_config",
    "load_result",
    "plan",
    "run",
}


def wrong_method(**fields: Any) -> fluvial.Method:
    """Return MOMENTUM with fields of other types."""
    return replace(MOMENTUM, **fields)


def test_the_public_names_are_these() -> None:
    assert set(fluvial.__all__) == NAMES
    assert len(NAMES) <= 25
    assert sorted(fluvial.__all__) == fluvial.__all__


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_name_has_a_docstring_and_stands_on_the_page(name: str) -> None:
    assert getattr(fluvial, name).__doc__
    assert f"`{name}`" in PAGE.read_text()


def test_the_page_names_no_other() -> None:
    table = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), flags=re.MULTILINE)
    assert sorted(table) == sorted(NAMES)


def test_another_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fluvial.nothing


def test_the_import_loads_nothing_heavy() -> None:
    code = "import fluvial, sys; print(sorted({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_examples_of_the_page_run(
    run_config: dict[str, Any],
    three_sites: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every block in its order, in one namespace, on the tiny model of the tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    (tmp_path / "my.toml").write_text(
        f"""
rounds = 2
compare = ["local"]
model = {{ name_or_path = "{tiny_model}" }}
data.source = "{three_sites}"
data.max_length = 32
data.partition = {{ by = "column", column = "client" }}
train = {{ max_steps = 2, per_device_train_batch_size = 4 }}
evaluate = {{ sample_tokens = 2 }}
"""
    )
    found = blocks(PAGE, "python")
    assert len(found) >= 5
    space: dict[str, Any] = {}
    for block in found:
        exec(compile(block, str(PAGE), "exec"), space)

    printed = capsys.readouterr()
    assert "held-out loss" in printed.out
    assert "round" in printed.err


def test_a_result_shows_in_a_terminal_and_in_a_notebook(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    events: list[str] = []
    result = fluvial.run(
        run_config | {"compare": ["local"]},
        tmp_path / "<run>",
        progress=lambda event: events.append(event.kind),
    )
    assert events.count("round") == 4
    assert events[-1] == "result"
    loss = f"{result.values['heldout']['final']['loss']:.4f}"
    assert loss in str(result)
    assert f"<td>{loss}</td>" in result._repr_html_()
    assert "local only" in str(result)
    assert result.verdict in result._repr_html_().replace("&#x27;", "'")
    assert (result.weights / "adapter_model.safetensors").exists()
    assert [record["round"] for record in result.rounds] == [1, 2]
    assert str(fluvial.load_result(tmp_path / "<run>")) == str(result)


def test_mistakes_are_errors_with_a_remedy(run_config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(fluvial.ConfigError, match="needs the folder"):
        fluvial.run(run_config)
    with pytest.raises(fluvial.ConfigError, match="rounds"):
        fluvial.check(run_config, ["rounds = 0"])
    with pytest.raises(fluvial.ConfigError, match="takes none"):
        fluvial.load_config(fluvial.load_config(run_config), ["rounds = 1"])
    with pytest.raises(fluvial.FluvialError, match="holds no run"):
        fluvial.load_result(tmp_path)


def test_a_check_shows_what_the_command_shows(run_config: dict[str, Any]) -> None:
    checked = fluvial.check(run_config)
    assert f"{checked.values['model']['trainable']:,} trainable" in str(checked)
    assert str(checked).splitlines()[0] in checked._repr_html_()


def test_a_method_can_be_defined_again_but_no_method_of_the_package() -> None:
    values = {"rounds": 2, "method": {"name": "momentum"}}
    fluvial.load_config(values, methods=[MOMENTUM])
    again = replace(MOMENTUM)
    fluvial.load_config(values, methods=[again])
    assert METHODS["momentum"] is again

    with pytest.raises(fluvial.ConfigError, match="'fedavg' is the name of another method"):
        fluvial.load_config(values, methods=[replace(METHODS["fedavg"])])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fleet": "ray"}, "choose 'process' or 'flower'"),
        ({"progress": "yes"}, "progress: got 'yes'"),
    ],
)
def test_a_wrong_argument_of_run_is_refused(
    wrong: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(fluvial.ConfigError, match=message):
        fluvial.run({"rounds": 1}, tmp_path / "run", **wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"config": 3}, "config: got 3 of type int; expected a TOML file"),
        ({"overrides": "rounds = 1"}, "overrides: got .* of type str; expected a list"),
        ({"overrides": [1]}, r"overrides\[0\]: got 1 of type int"),
        ({"overrides": None}, "overrides: got None"),
        ({"methods": MOMENTUM}, "methods: got .* of type Method; expected a list"),
        ({"methods": ["momentum"]}, r"methods\[0\]: got 'momentum' of type str"),
        ({"methods": [wrong_method(config=int)]}, r"methods\[0\].config: got"),
        ({"methods": [wrong_method(server=None)]}, r"methods\[0\].server: got None"),
        ({"methods": [wrong_method(tasks={"a": 1})]}, r"tasks\['a'\]: got 1"),
        ({"codecs": OneScale}, "codecs: got .*; expected a list"),
        ({"codecs": [OneScaleSettings]}, r"codecs\[0\]: got .*; expected a class derived"),
        ({"codecs": [fluvial.Codec]}, r"codecs\[0\]: Codec lacks body, parse"),
    ],
)
def test_an_argument_of_another_type_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(fluvial.ConfigError, match=message):
        fluvial.load_config(**({"config": {"rounds": 1}} | wrong))


@pytest.mark.parametrize("wrong", [{"out": 3}, {"out": b"run"}, {"resume": "yes"}])
def test_a_path_or_flag_of_another_type_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    (name,) = wrong
    with pytest.raises(fluvial.ConfigError, match=f"{name}: got .* expected"):
        fluvial.run(**(dict[str, Any](config={"rounds": 1}, out=tmp_path / "run") | wrong))
    with pytest.raises(fluvial.ConfigError, match="folder: got 3"):
        fluvial.load_result(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("code", [1, 63, 256, -1, "65", True])
def test_a_codec_outside_the_free_numbers_is_refused(code: object) -> None:
    wrong = type("Wrong", (OneScale,), {"code": code})
    with pytest.raises(fluvial.ConfigError, match="from 64 to 255"):
        fluvial.load_config({"rounds": 1}, codecs=[wrong])


def test_two_codecs_with_one_number_are_refused() -> None:
    class OtherSettings(fluvial.CodecSettings):
        name: Literal["other_scale"] = "other_scale"

    class Other(OneScale):
        def __init__(self, settings: OtherSettings, layout: fluvial.Layout) -> None:
            super().__init__(settings, layout)  # type: ignore[arg-type]

    with pytest.raises(fluvial.ConfigError, match="choose another number"):
        fluvial.load_config({"rounds": 1}, codecs=[OneScale, Other])


class Reversed(OneScale):
    """A codec whose values come back in another order."""

    def parse(self, reader: fluvial.Reader) -> torch.Tensor:
        """Return the values from the last to the first."""
        return super().parse(reader).flip(0)


class Negated(OneScale):
    """A codec whose values come back with the other sign."""

    def parse(self, reader: fluvial.Reader) -> torch.Tensor:
        """Return the negative values."""
        return -super().parse(reader)


class Drifting(OneScale):
    """A codec that draws from the generator of the process."""

    def body(self, vector: torch.Tensor, seed: int) -> bytes:
        """Return the code of the vector and some noise."""
        return super().body(vector + torch.randn(vector.shape), seed)


class Refusing(OneScale):
    """A codec that refuses what it made."""

    def parse(self, reader: fluvial.Reader) -> torch.Tensor:
        """Raise an error."""
        raise fluvial.WireError("no such scale")


def with_size(size: object) -> type[OneScale]:
    """Return a codec whose frames have `size` bytes, as it says."""
    return type("Sized", (OneScale,), {"frame_size": classmethod(lambda *_: size)})


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        (Reversed, "parse must invert body"),
        (Negated, "parse must invert body"),
        (Drifting, "encoding the same update twice with one seed gives other bytes"),
        (Refusing, "parse refuses what body made: no such scale"),
        (with_size(None), "frame_size of codec 'one_scale' returned NoneType; expected a whole"),
        (with_size(100.5), "frame_size of codec 'one_scale' returned float; expected a whole"),
        (with_size(-3), "frame_size of codec 'one_scale' returned int; expected a whole number of"),
        (with_size(20), "and frame_size says at most 20; mend one of the two"),
    ],
)
def test_a_codec_that_does_not_do_what_it_says_is_refused(
    codec: type[OneScale], message: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    table = run_config | {"codec": {"name": "one_scale"}}
    with pytest.raises(fluvial.ConfigError, match=re.escape(message)):
        fluvial.run(table, tmp_path / "run", codecs=[codec], progress=False)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_package_leaves_the_free_numbers_alone() -> None:
    taken = {codec.code for name, codec in CODECS.items() if name not in own._OWN_CODECS}
    assert not taken & set(OWN_CODES)
    assert "64 to 255" in (ROOT / "docs" / "adding-a-codec.md").read_text()


class WrongRound(MomentumServer):
    """A server half whose round returns nothing."""

    def round(self, number: int, fleet: fluvial.Fleet) -> Any:
        """Return None."""
        super().round(number, fleet)


class WrongState(MomentumServer):
    """A server half whose state is no payload."""

    def state(self) -> Any:
        """Return a table."""
        return {}


class WrongMetrics(MomentumServer):
    """A server half whose metrics have no loss."""

    def round(self, number: int, fleet: fluvial.Fleet) -> Any:
        """Return the number of sites alone."""
        return {"sites": super().round(number, fleet)["sites"]}


class WrongValue(MomentumServer):
    """A server half with a metric that JSON cannot hold."""

    def round(self, number: int, fleet: fluvial.Fleet) -> Any:
        """Return a set among the metrics."""
        return {**super().round(number, fleet), "seen": {1, 2}}


class WrongLoss(MomentumServer):
    """A server half whose loss is text."""

    def round(self, number: int, fleet: fluvial.Fleet) -> Any:
        """Return a loss in words."""
        return {**super().round(number, fleet), "loss": "low"}


class TakenNames(MomentumServer):
    """A server half that measures bytes by itself."""

    def round(self, number: int, fleet: fluvial.Fleet) -> Any:
        """Return metrics with the names of the run's own."""
        return {**super().round(number, fleet), "round": 7, "bytes_up": 0}


class WrongCount(MomentumServer):
    """A server half whose number of sites is text."""

    def round(self, number: int, fleet: fluvial.Fleet) -> Any:
        """Return a number in words."""
        return {**super().round(number, fleet), "sites": "three"}


class HalfModel(MomentumServer):
    """A server half whose model lacks tensors."""

    def model(self) -> Named:
        """Return the first tensor alone."""
        return dict(list(super().model().items())[:1])


class NotFinite(MomentumServer):
    """A server half whose second adapter is not finite."""

    def round(self, number: int, fleet: fluvial.Fleet) -> Any:
        """Spoil the adapter after a round."""
        metrics = super().round(number, fleet)
        self.adapter = scale(self.adapter, math.nan)
        return metrics


class NumpyServer(MomentumServer):
    """A server half whose first adapter is of NumPy arrays."""

    def round(self, number: int, fleet: fluvial.Fleet) -> Any:
        """Replace the adapter before a round."""
        wrong: Any = {name: tensor.numpy() for name, tensor in self.adapter.items()}
        self.adapter = wrong
        return super().round(number, fleet)


def wrong_update(**fields: Any) -> Any:
    """Return a training whose update has other fields."""

    def train(_: fluvial.Site, received: Named, *_rest: object) -> LocalUpdate:
        good = LocalUpdate(scale(received, 0.0), 1, 1.0)
        return replace(good, **fields)

    return {**MOMENTUM.tasks, "train": shared(train, terms)}


def train_to_a_pair(*_: object) -> Any:
    return {}, 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"server": WrongRound}, "round of method 'momentum' returned NoneType; expected a dict"),
        ({"server": WrongState}, "state of method 'momentum' returned dict; expected a Payload"),
        ({"server": WrongMetrics}, "round of method 'momentum': its metrics lack loss"),
        (
            {"server": WrongValue},
            "its metrics are not plain JSON values: 'seen': Object of type set",
        ),
        ({"server": WrongLoss}, "its metrics have a loss that is no number"),
        ({"server": TakenNames}, "its metrics have bytes_up and round, which the run measures"),
        ({"server": WrongCount}, "its metrics have a number of sites that is no whole number"),
        ({"server": NotFinite}, "the adapter that the server half sends: NaN or Inf"),
        ({"server": NumpyServer}, "lora_A.weight' is ndarray; expected a Tensor"),
        ({"server": HalfModel}, "model: tensors of another layout"),
        ({"server": lambda *_: None}, "server of method 'momentum' returned NoneType; expected a"),
        ({"traits": None}, "methods[0].traits: got None; expected a fluvial.Traits"),
        ({"tasks": {}}, "the server half asks for the task 'train', and the sites of this method"),
        ({"tasks": wrong_update(tensors=None)}, "LocalUpdate.tensors is not a dict from names"),
        ({"tasks": wrong_update(tensors={"a": 1})}, "LocalUpdate.tensors is not a dict from names"),
        ({"tasks": wrong_update(tensors={})}, "WireError at fluvial/"),
        ({"tasks": wrong_update(loss=math.nan)}, "LocalUpdate.loss is not a finite number"),
        ({"tasks": wrong_update(loss="low")}, "LocalUpdate.loss is not a finite number"),
        ({"plan": lambda *_: None}, "plan of method 'momentum' returned NoneType; expected a Plan"),
        (
            {"tasks": {**MOMENTUM.tasks, "train": lambda *_: {}}},
            "task 'train' of method 'momentum' returned dict; expected a Payload",
        ),
        (
            {"tasks": {**MOMENTUM.tasks, "train": shared(train_to_a_pair, terms)}},
            "train of method 'momentum' returned tuple; expected a LocalUpdate",
        ),
    ],
)
def test_a_method_that_returns_another_type_is_named(
    wrong: dict[str, Any], message: str, run_config: dict[str, Any], tmp_path: Path
) -> None:
    table = run_config | {"method": {"name": "momentum"}}
    with pytest.raises(fluvial.FluvialError, match=re.escape(message)):
        fluvial.run(table, tmp_path / "run", methods=[wrong_method(**wrong)], progress=False)


def test_a_type_whose_name_may_hold_records_is_not_named() -> None:
    secret = type("patient 42", (), {})()
    assert wrong_return("train", secret, "a dict") == "train returned another type; expected a dict"


def test_a_run_that_its_watcher_stopped_continues_to_the_same_weights(
    run_config: dict[str, Any], tmp_path: Path
) -> None:
    whole = fluvial.run(run_config, tmp_path / "whole", progress=False)

    def stop(event: Any) -> None:
        assert event.kind != "round"

    with pytest.raises(AssertionError):
        fluvial.run(run_config, tmp_path / "stopped", progress=stop)

    resumed = fluvial.run(run_config, tmp_path / "stopped", resume=True, progress=False)
    assert without_times(resumed.values) == without_times(whole.values)


def without_times(value: Any) -> Any:
    """Return the content of result.json without times, their ratios and the memory of the
    process."""
    if isinstance(value, list):
        return [without_times(entry) for entry in value]
    if not isinstance(value, dict):
        return value

    return {
        key: without_times(entry)
        for key, entry in value.items()
        if not re.search(r"(^|_)(seconds|s)$|rss|peak", key)
    }
