"""Manifests and settings of the paper's download that are refused."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as runs
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from fluvial.errors import ConfigError, WireError
from fluvial.methods.fedcybgd.proxy import (
    Anatomy,
    Manifest,
    ProxySettings,
    plan_proxy,
)
from tests.support.proxy import (
    BOTH,
    LAYERS,
    WHOLE,
    Tiny,
    kept_fraction,
    made_up,
)


def test_manifests_that_lie_are_refused() -> None:
    anatomy, scores = made_up(10, neurons=100)
    settings = ProxySettings(kept=0.5, drop=0.4, prune=BOTH, randomised=True)
    manifest = plan_proxy(scores, anatomy, trained=(4,), settings=settings, seed=1, visit=0)
    good = manifest.values()
    assert Manifest.from_values(good, anatomy, (4,)) == manifest
    gone = manifest.dropped[0]
    left = next(iter(manifest.neurons))
    bits = good["neurons"][str(left)]
    wrong: list[dict[str, Any]] = [
        {"dropped": [*manifest.dropped, near]}
        for near in (0, 3, 4, 5, 9, 10, -1, True, 1.0, "1", None, gone)
    ]
    wrong += [{"dropped": list(reversed(manifest.dropped))}, {"dropped": {}}, {"dropped": None}]

    for name in ("neurons", "groups"):
        wrong += [
            {name: good[name] | {key: bits}}
            for key in ("4", str(gone), "10", "-1", "01", "", "x", str(10**30))
        ]
        others: list[Any] = [None, [], "00", 3]
        wrong += [{name: other} for other in others]

    wrong += [
        {"neurons": good["neurons"] | {str(left): text}}
        for text in (
            bits[:-2],
            bits + "00",
            bits[:-1] + "f",
            "0" * len(bits),
            "f" * 25 + "0",
            bits.upper(),
            "zz" * 13,
        )
        if text != bits
    ]
    wrong += [
        {"neurons": good["neurons"] | {str(left): text}}
        for text in (None, 1, [0, 1], " " * len(bits), "")
    ]
    wrong += [
        {"groups": good["groups"] | {str(left): text}}
        for text in ("00", "f0", "08", "ff", "8", "800")
    ]
    inner = next(iter(manifest.gains))
    wrong += [
        {"gains": good["gains"] | {str(inner): gain}}
        for gain in (1.0, 0.5, -2.0, 1e9, 2, True, "2", None, [1.5])
    ]
    wrong += [{"gains": {str(index): 2.0}} for index in (0, 3, 4, 9, gone)]
    wrong += [{"more": 1}]

    for change in wrong:
        with pytest.raises(WireError, match="proxy manifest"):
            Manifest.from_values(good | change, anatomy, (4,))

    for name in good:
        with pytest.raises(WireError, match="expected dropped"):
            Manifest.from_values(
                {key: value for key, value in good.items() if key != name}, anatomy, (4,)
            )

    without_heads, _ = made_up(10, neurons=100, prune="neurons")
    with pytest.raises(WireError, match="groups are pruned"):
        Manifest.from_values(good, without_heads, (4,))


@runs(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_change_of_a_manifest_is_refused_or_another_valid_manifest(data: st.DataObject) -> None:
    anatomy, scores = made_up(8, neurons=20)
    settings = ProxySettings(kept=0.5, drop=0.4, prune=BOTH, randomised=True)
    text = json.dumps(
        plan_proxy(scores, anatomy, trained=(2,), settings=settings, seed=1, visit=0).values()
    )
    place = data.draw(st.integers(0, len(text) - 1))
    changed = (
        text[:place] + data.draw(st.sampled_from('0123456789abcdef"-.,:[]{}e ')) + text[place + 1 :]
    )

    try:
        read = Manifest.from_values(json.loads(changed), anatomy, (2,))
    except (WireError, json.JSONDecodeError):
        return

    assert Manifest.from_values(read.values(), anatomy, (2,)) == read
    assert 2 not in read.dropped
    assert 0 < kept_fraction(read) <= 1


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"kept": 0.9, "drop": 0.25}, "kept=0.9: with drop=0.25 a share of 0.75 is left"),
        ({"kept": 1, "drop": 0, "multiple": 8}, "multiple: without effect"),
        ({"kept": 1, "drop": 0, "prune": BOTH}, "prune: without effect"),
        ({"drop": 0, "randomised": True}, "randomised: without effect"),
        ({"kept": 0}, "kept"),
        ({"drop": 1, "kept": 0.1}, "drop"),
        ({"multiple": 0}, "multiple"),
        ({"rho": 0.5}, "rho"),
    ],
)
def test_settings_that_cannot_be_are_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ProxySettings(**table)


def test_a_share_that_cannot_be_reached_is_refused_with_what_can(
    tiny: Callable[[str], Tiny],
) -> None:
    whole = tiny("llama")
    with pytest.raises(
        ConfigError,
        match=r"kept=0.2 .* attainable is 0\.\d+ to 1\.0000; raise kept or drop, or prune=",
    ):
        whole.plan(ProxySettings(kept=0.2, drop=0), 2)

    with pytest.raises(ConfigError, match="attainable is 1.0000 to 1.0000"):
        whole.plan(ProxySettings(), *range(LAYERS))
    assert kept_fraction(whole.plan(WHOLE, *range(LAYERS))) == 1


def test_models_of_another_build_are_refused_by_what_they_lack() -> None:
    import transformers

    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "pad_token_id": 0,
    }
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes))

    with pytest.raises(
        ConfigError,
        match=r"transformer\.h\.0 \(BloomBlock\).*gate_proj, up_proj, down_proj; gate_up",
    ):
        Anatomy.of(bloom, "neurons")

    phi = transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**sizes, intermediate_size=24, num_key_value_heads=2)
    )
    assert Anatomy.of(phi, "neurons").layers[1].mlp.units == 24
    with pytest.raises(ConfigError, match="q_proj, k_proj, v_proj, o_proj"):
        Anatomy.of(phi, BOTH)
    olmo = transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**sizes, intermediate_size=24))
    with pytest.raises(ConfigError, match="no weights across heads"):  # its norm is over all heads
        Anatomy.of(olmo, BOTH)
    renamed: Any = transformers.Phi3ForCausalLM(phi.config)
    for layer in renamed.model.layers:
        layer.mixer = layer._modules.pop("self_attn")
    with pytest.raises(ConfigError, match=r"Phi3DecoderLayer\) has no 'self_attn' or 'attn'"):
        Anatomy.of(renamed, "neurons")
    with pytest.raises(ConfigError, match="Linear has 0 module lists"):
        Anatomy.of(nn.Linear(2, 2), "neurons")
