"""Greedy generation through the three parts is that of the whole model, token by token."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import GeneratorType
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

from fluvial.errors import ConfigError, WireError
from fluvial.models.generation import continuations
from fluvial.models.loading import load_base
from fluvial.models.parts import PartPool
from fluvial.models.pool import ModelPool
from fluvial.models.pretrained import ModelConfig
from fluvial.models.split import Cut, Part
from fluvial.models.split_generation import (
    ServerGeneration,
    SiteGeneration,
    check_generation,
    generate,
)
from fluvial.models.states import base_state
from fluvial.models.targets import LoraSettings
from tests.oracle.test_split import LAYERS
from tests.support.model_kinds import save_kind

KINDS_OF_LAYERS = [*["sliding_attention", "full_attention"] * 2, "sliding_attention"]
WINDOWS: dict[str, Any] = {"sliding_window": 4, "layer_types": KINDS_OF_LAYERS}
UNTIED = {"tie_word_embeddings": False}
"""Otherwise these models repeat their last token, whatever their layers do."""
CHANGES: dict[str, dict[str, Any]] = {
    "gemma2": WINDOWS | UNTIED | {"head_dim": 8},
    "gemma3_text": WINDOWS | UNTIED | {"head_dim": 8},
    "gemma4_text": WINDOWS | UNTIED | {"layer_types": [*KINDS_OF_LAYERS[1:], "full_attention"]},
    "gpt_oss": WINDOWS,
    "mistral": {"sliding_window": 4},
    "phi3": {"sliding_window": 4},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_positions": 128},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 128},
}
EQUAL = [
    *("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma4_text", "gpt2", "gpt_neox"),
    *("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "phi3", "mistral", "opt", "falcon"),
    *("bloom", "mpt", "cohere"),
]
REFUSED = ["mamba", "jamba"]
NEW = 24


def config_of(kind: str, tmp_path: Path) -> ModelConfig:
    """Return a model with weights so large that the answers vary."""
    settings: dict[str, Any] = {"num_hidden_layers": LAYERS, "initializer_range": 0.4}
    folder = save_kind(kind, tmp_path / kind, **settings, **CHANGES.get(kind, {}))
    return ModelConfig(name_or_path=str(folder), device="cpu")


@contextmanager
def parts_of(config: ModelConfig, cut: Cut) -> Iterator[tuple[Part, Part]]:
    """Lend the site's part and the server's, of the base."""
    pools = [PartPool(config, None, cut, server=server) for server in (False, True)]
    with (
        pools[0].part(base_state(pools[0].layout), trainable=False) as site,
        pools[1].part(base_state(pools[1].layout), trainable=False) as server,
    ):
        yield site, server


def split_answer(site: Part, server: Part, prompt: list[int], eos: int | None = None) -> list[int]:
    """Return the new tokens; the exchanges are one prompt and single tokens."""
    session = ServerGeneration(server, max_tokens=len(prompt) + NEW)
    steps = generate(site, prompt, max_new_tokens=NEW, stops=() if eos is None else {eos})
    hidden = next(steps)
    shapes = [tuple(hidden.shape)]

    try:
        while True:
            answer = session.step(hidden)
            assert answer.shape == hidden.shape
            hidden = steps.send(answer)
            shapes.append(tuple(hidden.shape))
    except StopIteration as stopped:
        tokens: list[int] = stopped.value
    finally:
        session.close()

    width = shapes[0][2]
    assert shapes == [(1, len(prompt), width)] + [(1, 1, width)] * (len(tokens) - 1)
    return tokens


@pytest.mark.parametrize("kind", EQUAL)
def test_the_tokens_are_those_of_generate_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    from transformers import GenerationConfig

    config = config_of(kind, tmp_path)
    whole: Any = load_base(config)
    whole.generation_config = GenerationConfig()
    draw = torch.Generator().manual_seed(7)
    wanted = []
    got = []

    with parts_of(config, Cut(LAYERS, 2, 1)) as (site, server):
        for length in (1, 3, 7, 12):
            prompt = torch.randint(3, 300, (1, length), generator=draw)
            output = whole.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
            )
            wanted.append(output[0, length:].tolist())
            got.append(split_answer(site, server, prompt[0].tolist()))

    assert got == wanted
    assert len({token for answer in wanted for token in answer}) >= 9


@pytest.mark.parametrize("kind", REFUSED)
def test_an_architecture_with_other_states_is_refused(kind: str, tmp_path: Path) -> None:
    with (
        parts_of(config_of(kind, tmp_path), Cut(LAYERS, 2, 1)) as (_, server),
        pytest.raises(ConfigError, match="keeps other states than keys and values"),
    ):
        check_generation(server)


def test_an_answer_ends_with_the_end_of_text(tmp_path: Path) -> None:
    with parts_of(config_of("llama", tmp_path), Cut(LAYERS, 1, 1)) as (site, server):
        tokens = split_answer(site, server, [5, 9, 200])
        third = split_answer(site, server, [5, 9, 200], eos=tokens[2])

    assert third == tokens[: tokens.index(tokens[2]) + 1]


def test_a_site_answers_prompts_of_text_as_the_whole_model_does() -> None:
    config = ModelConfig(device="cpu")
    lora = LoraSettings()
    whole = ModelPool(config, lora)
    cut = Cut.of(whole.outline.base)
    prompts = ["def add(a, b):\n", "import os\n"]

    with whole.model(whole.base_state()) as model:
        wanted = continuations(model, whole.tokenizer, prompts, max_new_tokens=16)

    sites, servers = (PartPool(config, lora, cut, server=server) for server in (False, True))
    with (
        sites.part(base_state(sites.layout), trainable=False) as site,
        servers.part(base_state(servers.layout), trainable=False) as server,
    ):
        generation = SiteGeneration(site, whole.tokenizer, max_new_tokens=16)
        got = []
        for prompt in prompts:
            session = ServerGeneration(server, max_tokens=200)
            steps = generation.answer(prompt)
            hidden = next(steps)
            try:
                while True:
                    hidden = steps.send(session.step(hidden))
            except StopIteration as stopped:
                got.append(stopped.value)

    assert got == wanted
    assert [answer.cut for answer in got] == [answer.cut for answer in wanted]


def test_sessions_of_one_part_do_not_disturb_each_other(tmp_path: Path) -> None:
    with parts_of(config_of("llama", tmp_path), Cut(LAYERS, 2, 1)) as (site, server):
        prompts = [[5, 9, 200], [77, 33, 81, 7]]
        alone = [split_answer(site, server, prompt) for prompt in prompts]
        sessions = [ServerGeneration(server, max_tokens=40) for _ in prompts]
        steps = [generate(site, p, max_new_tokens=NEW, stops=()) for p in prompts]
        hidden = [next(each) for each in steps]
        tokens: list[list[int]] = []

        while len(tokens) < len(prompts):
            for number, session in enumerate(sessions):
                try:
                    hidden[number] = steps[number].send(session.step(hidden[number]))
                except StopIteration as stopped:
                    tokens.append(stopped.value)

    assert tokens == alone


def test_a_cache_has_the_span_alone_and_is_freed(tmp_path: Path) -> None:
    with parts_of(config_of("llama", tmp_path), Cut(LAYERS, 2, 1)) as (site, server):
        session = ServerGeneration(server, max_tokens=40)
        steps = generate(site, [5, 9, 200], max_new_tokens=NEW, stops=())
        hidden = next(steps)
        for _ in range(4):
            hidden = steps.send(session.step(hidden))

        tokens = session.cache.tokens
        assert tokens == 6
        # Keys and values of two layers with two heads of 8 values, and a byte in three others.
        assert session.cache.nbytes == 2 * tokens * (2 * 2 * 8 * 4 + 3)

        assert isinstance(steps, GeneratorType)
        frame = steps.gi_frame
        assert frame is not None
        caches = [session.cache, frame.f_locals["first"], frame.f_locals["last"]]
        keys = [ref(layer.keys) for cache in caches for layer in cache.cache.layers]
        assert len(keys) == 3 * LAYERS
        del frame
        session.close()
        steps.close()
        gc.collect()
        assert all(key() is None for key in keys)
        assert [cache.nbytes for cache in caches] == [0, 0, 0]


@pytest.mark.parametrize(
    "hidden",
    [
        torch.zeros(1, 3, 31),
        torch.zeros(2, 3, 32),
        torch.zeros(1, 0, 32),
        torch.zeros(1, 41, 32),
        torch.zeros(3, 32),
        torch.zeros(1, 3, 32, dtype=torch.int64),
        torch.full((1, 3, 32), torch.nan),
    ],
)
def test_hidden_states_of_another_form_are_refused_at_both_ends(
    hidden: Tensor, tmp_path: Path
) -> None:
    with parts_of(config_of("llama", tmp_path), Cut(LAYERS, 2, 1)) as (site, server):
        session = ServerGeneration(server, max_tokens=40)
        with pytest.raises(WireError, match="hidden states of a session"):
            session.step(hidden)
        assert session.cache.tokens == 0

        steps = generate(site, [5, 9, 200], max_new_tokens=NEW, stops=())
        next(steps)
        with pytest.raises(WireError, match="hidden states of a session"):
            steps.send(hidden)


def test_a_layer_that_passes_the_cache_by_is_refused(tmp_path: Path) -> None:
    with parts_of(config_of("llama", tmp_path), Cut(LAYERS, 2, 1)) as (_, server):
        attention = server.model.get_submodule("model.layers.3.self_attn")
        inside = attention.forward

        def forward(*args: Any, **options: Any) -> Any:
            name = "cache" if "cache" in options else "past_key_values"
            return inside(*args, **{**options, name: None})

        attention.forward = forward
        with pytest.raises(ConfigError, match="cannot generate in parts"):
            check_generation(server)
