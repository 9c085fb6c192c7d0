"""Pre-train the embedded model from nothing on the reserved packages of Python's standard library.

    python scripts/pretrain_tiny.py --out src/fluvial/assets/tiny

About half an hour on two cores. The result is a folder that `transformers` loads: config, bf16
weights, tokenizer, and `TRAINING.json`, the record of how it was made.
"""

import argparse
import hashlib
import json
import logging
import platform
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fluvial.data import tokenize
from fluvial.data.stdlib import PRETRAIN, pretraining_documents, public_packages
from fluvial.seeds import derive, generator
from fluvial.training.config import TrainConfig
from fluvial.training.evaluate import heldout
from fluvial.training.train import train

VOCABULARY = 2048
CONTEXT = 256
SEED = 20261121


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that no text is ever unknown; BOS is put before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    """Train, measure on the public text, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3200)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    started = time.perf_counter()
    documents = pretraining_documents()
    tokenizer = train_tokenizer([document.text for document in documents])
    data = tokenize(
        ((document.name, {"text": document.text}) for document in documents),
        "text",
        tokenizer,
        max_length=CONTEXT,
        packing=True,
    )
    torch.manual_seed(derive(SEED, "weights") % 2**32)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    config = TrainConfig(
        learning_rate=3e-3,
        per_device_train_batch_size=16,
        max_steps=arguments.steps,
        lr_scheduler_type="cosine",
        warmup_ratio=0.02,
        weight_decay=0.1,
        adam_beta2=0.95,
    )
    report = train(
        model, data.examples, config, pad_token_id=0, generator=generator(SEED, "batches")
    )
    model.to(torch.bfloat16)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    public = [
        (document.name, {"text": document.text})
        for package in public_packages().values()
        for document in package
    ]
    unseen = tokenize(public, "text", tokenizer, max_length=CONTEXT, packing=True).examples[:200]
    measured = heldout(model.float(), unseen, pad_token_id=0)
    record = {
        "made_by": "scripts/pretrain_tiny.py",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seed": SEED,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "text": {
            "packages": list(PRETRAIN),
            "characters": sum(len(document.text) for document in documents),
            "tokens": sum(len(example.input_ids) for example in data.examples),
            "sha256": hashlib.sha256(
                "".join(document.text for document in documents).encode()
            ).hexdigest(),
        },
        "training": config.model_dump(),
        "label_tokens_seen": report.label_tokens,
        "mean_training_loss": round(report.loss, 4),
        "public_text_loss": round(measured.loss, 4),
        "public_text_accuracy": round(measured.accuracy, 4),
        "wall_s": round(time.perf_counter() - started),
    }
    (arguments.out / "TRAINING.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
