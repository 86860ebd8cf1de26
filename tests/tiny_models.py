"""Tiny models of every family, with a tokenizer and a calibration file beside them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SIZES = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 16, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
OPT = {"ffn_dim": 96, "word_embed_proj_dim": 32}


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> a saved random model of it: two layers, width 64, inner width 96, weights in fp16."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "model"
            torch.manual_seed(sum(map(ord, family)))
            sizes = SIZES | (OPT if family == "opt" else {"tie_word_embeddings": family == "qwen3"})
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
            for parameter in model.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
            model.half().save_pretrained(made[family])
            byte_tokenizer().save_pretrained(made[family])
        return made[family]

    return make


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 documents of 40 bytes."""
    path = tmp_path_factory.mktemp("text") / "calibration.jsonl"
    lines = [json.dumps({"text": f"{i * 7919 % 1000:03d} the quick brown fox jumps over {i}".ljust(40, ".")}) for i in range(40)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)
