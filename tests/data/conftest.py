"""A tokenizer and tiny models that need no file."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "a charming and often affecting journey . It was great",
    "a dull , lifeless film . It was terrible",
    "Question: is this true? Yes or No or Maybe?\nYes\nNo\nMaybe",
    "Does the word have the same meaning in these two sentences?",
]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens, no BOS; " great" and " terrible" are one token each."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = {"special_tokens": ["<eos>"], "initial_alphabet": alphabet, "show_progress": False}
    bpe.train_from_iterator(TEXT * 4, trainers.BpeTrainer(vocab_size=400, **special))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
