"""Tiny models made from a configuration, offline and on one thread."""

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fluvial.federation import in_process
from tests.slow import is_slow

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
_CACHE = tempfile.TemporaryDirectory(prefix="fluvial-tests-")  # removed when the process ends
os.environ["HF_HOME"] = _CACHE.name
os.environ["HF_DATASETS_CACHE"] = str(Path(_CACHE.name) / "datasets")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell without job control starts `make test &` so, and the processes of a test inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
CONTEXT = 128
MARKED = ("oracle", "contract")
"""Folders whose tests bear the marker of the same name."""
_TEXTS = [
    "The river carries the water of many small streams, and no stream sees the whole river.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Question: what is the capital of France? Answer: Paris. user assistant system",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of tests/oracle and tests/contract by their folder, and the slow ones."""
    here = Path(__file__).parent
    for item in items:
        file = item.path.relative_to(here)
        if file.parts[0] in MARKED:
            item.add_marker(file.parts[0])

        test, _, case = item.name.partition("[")
        if is_slow(f"{file.as_posix()}::{test}", case.removesuffix("]")):
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_site_works_on() -> Iterator[None]:
    """End a test when its sites' threads have ended: late ones would work beside the next test."""
    yield
    for thread in list(in_process._working):
        thread.join(60)


def _tokenizer() -> Any:
    """Byte-level BPE with BOS before every text, as `scripts/pretrain_tiny.py` makes it, and a chat
    template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _TEXTS,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = CHAT_TEMPLATE

    return made


def _llama(folder: Path, **changes: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "attention_dropout": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return saved_model(LlamaForCausalLM, LlamaConfig(**(settings | changes)), folder)


def saved_model(kind: Any, config: Any, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(20261121)
        kind(config).save_pretrained(folder)

    _tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tokenizer of the tiny models: about 300 tokens, <pad>, <s>, </s>, a chat template."""
    return _tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama: hidden 32, 2 layers, 4 heads, FFN 64, context 128, tied
    embeddings."""
    return _llama(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def tiny_gqa_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two key-value heads, so that k and v are narrower than q."""
    return _llama(tmp_path_factory.mktemp("tiny_gqa_model"), num_key_value_heads=2)


@pytest.fixture(scope="session")
def tiny_gpt2_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random GPT-2 of the same size: fused `c_attn`, Conv1D weights, dropouts of 0.1 in
    its config."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=300,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=64,
        n_positions=CONTEXT,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )

    return saved_model(GPT2LMHeadModel, config, tmp_path_factory.mktemp("tiny_gpt2_model"))


@pytest.fixture(scope="session")
def three_sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file with the records of three clients of unequal size and vocabulary."""
    words = {
        "north": "snow ice wind frost",
        "south": "sun sand heat palm",
        "west": "rain sea wave fog",
    }
    path = tmp_path_factory.mktemp("data") / "three.jsonl"
    lines = []

    for share, (client, text) in enumerate(words.items(), start=2):
        for number in range(10 * share):
            order = text.split()[number % 4 :] + text.split()[: number % 4]
            record = {"client": client, "text": f"{number} " + " ".join(order * (1 + number % 3))}
            lines.append(json.dumps(record))

    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def run_config(tiny_model: Path, three_sites: Path) -> dict[str, Any]:
    """Two rounds of FedAvg over three sites, a table for `fluvial.runs.config.parse`; about a
    second."""
    return {
        "seed": 1,
        "rounds": 2,
        "model": {"name_or_path": str(tiny_model)},
        "lora": {"r": 4, "lora_alpha": 16, "target_modules": "attention"},
        "data": {
            "source": str(three_sites),
            "public_source": str(three_sites),
            "form": "text",
            "max_length": 32,
            "partition": {"by": "column", "column": "client"},
        },
        "train": {"learning_rate": 1e-2, "max_steps": 3, "per_device_train_batch_size": 4},
        "evaluate": {"sample_tokens": 2},
    }


@pytest.fixture
def one_site(run_config: dict[str, Any]) -> dict[str, Any]:
    """The same with only the largest of the three sites."""
    data = run_config["data"] | {"partition": {"by": "column", "column": "client", "largest": 1}}
    return run_config | {"data": data}
