"""Output weights that stand in for the neurons that a proxy leaves out."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fluvial.data import Example
from fluvial.methods.fedcybgd.proxy import ProxySettings, cut, measure
from fluvial.methods.fedcybgd.proxy.pruned_model import compensated
from tests.support.fedcybgd import Stage
from tests.support.proxy import Tiny, logits, make

THIN = ProxySettings(kept=0.6, drop=0.0, multiple=1)
CORRECTED = THIN.model_copy(update={"correction": "least-squares"})


def test_the_weights_are_those_of_lstsq() -> None:
    """Against LAPACK on the activations themselves; the tolerance is for the ridge."""
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(200, 12, generator=draw, dtype=torch.float64)
    rows = torch.randn(12, 5, generator=draw, dtype=torch.float64)
    stay = torch.tensor([0, 2, 3, 7, 8, 11])
    exact = torch.linalg.lstsq(hidden[:, stay], hidden @ rows).solution
    assert torch.allclose(compensated(rows, stay, hidden.T @ hidden), exact, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "glm4"])
def test_neurons_that_others_can_stand_in_for_cost_nothing(kind: str, tmp_path: Path) -> None:
    """Every neuron that is left out is made a copy of one that stays; the tolerance is for the
    ridge."""
    whole = make(kind, tmp_path)
    manifest = whole.plan(CORRECTED, 2)
    with torch.no_grad():
        for index, stay in manifest.neurons.items():
            mlp = manifest.anatomy.layers[index].mlp
            for along in mlp.axes:
                if along.name != f"{mlp.out}.weight":
                    units = whole.weights[along.name].movedim(along.axis, 0)
                    for start in range(0, len(units), mlp.units):
                        for gone in set(range(mlp.units)) - set(stay):
                            units[start + gone] = units[start + stay[0]]

    rows = torch.randint(3, 300, (40, 12), generator=torch.Generator().manual_seed(6)).tolist()
    examples = [Example(row, row) for row in rows]
    scores = measure(whole.model, manifest.anatomy, examples, pad_token_id=0, moments=True)
    again = replace(manifest, moments={index: scores.moments[index] for index in manifest.neurons})
    plain = replace(manifest, moments={})
    target = logits(whole.model)
    error = (logits(whole.slim(again)) - target).norm() / target.norm()
    assert error < 2e-3
    assert (logits(whole.slim(plain)) - target).norm() / target.norm() > 10 * error


def test_a_correction_costs_no_byte(tiny: Callable[[str], Tiny]) -> None:
    whole = tiny("llama")
    plain = whole.plan(THIN, 2)
    manifest = whole.plan(CORRECTED, 2)
    assert not plain.moments
    assert manifest.moments.keys() == manifest.neurons.keys()
    assert manifest.values() == plain.values()
    first, second = cut(whole.weights, plain), cut(whole.weights, manifest)
    assert {name: each.shape for name, each in first.items()} == {
        name: each.shape for name, each in second.items()
    }
    changed = {name for name, each in first.items() if not torch.equal(each, second[name])}
    assert changed == {
        f"{manifest.anatomy.layers[index].mlp.out}.weight" for index in manifest.neurons
    }


def test_the_server_sends_what_is_corrected(stage: Stage) -> None:
    """The gradient of a run's blocks on public text comes closer to the exact one."""
    cosines = []
    for more in ({}, {"correction": "least-squares"}):
        download = {"form": "proxy", "kept": 0.6, "drop": 0.0} | more
        run = stage.opened(stage.table(2, {"download": download, "gate": {"threshold": 0.01}}))
        cosines.append(sum(run.server.setup(run.fleet)["gradient_cosines"].values()))

    assert cosines[1] > cosines[0]


def test_nothing_to_correct_is_refused() -> None:
    with pytest.raises(ValueError, match="correction: without effect under kept=1"):
        ProxySettings(kept=1, drop=0, correction="least-squares")
