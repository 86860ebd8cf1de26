"""A tiny quantized Llama with a tokenizer, a small sentiment data set, and runs of them: nothing but this file is needed."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from qzo.tune import Tuner

GOOD, BAD = ("great", "lovely", "charming", "clever"), ("awful", "dull", "boring", "terrible")
NOUNS = ("film", "story", "cast", "ending", "plot", "song", "scene", "book")
RECIPE = {
    "task": "jsonl", "prompt": '"{sentence} It was"', "choices": '[" terrible", " great"]', "label": "label",
    "eps": 0.03, "lr": 0.01, "steps": 6, "batch_size": 4, "save_every": 4, "log_every": 2, "max_length": 32,
    "dtype": "fp32", "device": "cpu", "threads": 1,
}  # fmt: skip


def sentences() -> Iterator[dict]:
    """All the data there is: 64 labelled sentences."""
    for noun in NOUNS:
        for good, bad in zip(GOOD, BAD, strict=True):
            yield {"sentence": f"a {good} {noun} .", "label": 1}
            yield {"sentence": f"a {bad} {noun} .", "label": 0}


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """Byte-level BPE whose words are those of the data: " great" and " terrible" are one token each."""
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = [f"{record['sentence']} It was {word}" for record in sentences() for word in ("great", "terrible")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")


def make_model(folder: Path, **sizes: int) -> Path:
    """A random Llama in fp16 with its tokenizer: one layer of width 64, inner width 88 (a partial last group)."""
    # Here and not above: it brings triton, which must not be there before conftest.py has set TRITON_INTERPRET.
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(**{
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2, **sizes,
    })  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_data(folder: Path) -> Path:
    records = list(sentences())
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", records[:48]), ("validation", records[48:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
    return folder


def write_recipe(path: Path, model: Path, data: Path, **keys: object) -> str:
    """A recipe file of RECIPE with other or further keys; None leaves a key out."""
    values = {"model": model, "data": data, "output_dir": path.with_name("run"), **RECIPE, **keys}
    shown = {True: "true", False: "false"}
    lines = [f"{k}: {shown[v] if isinstance(v, bool) else v}" for k, v in values.items() if v is not None]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def stop_at(run: "Tuner", step: int, error: BaseException | None = None) -> "Tuner":
    """The same Tuner, which `error`, by default a signal, will stop before it launches `step`."""
    from qzo.errors import Interrupted

    launch = run.launch

    def launched() -> None:
        if run.optimizer.steps == step:
            raise error or Interrupted("here", 15, "")
        launch()

    run.launch = launched
    return run


def edit_json(path: Path, **keys: object) -> None:
    """Set keys of a JSON object in a file; None takes one away."""
    values = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.fixture(scope="session")
def llama16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 16-bit folder. Not to be written to."""
    return make_model(tmp_path_factory.mktemp("llama16") / "model")


@pytest.fixture(scope="session")
def llama4(llama16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GPTQ folder: 4 bits, groups of 32. Not to be written to."""
    from qzo.quantize import quantize_model

    out = tmp_path_factory.mktemp("llama4") / "model"
    quantize_model(str(llama16), out, "rtn", 4, 32, device="cpu")
    return out


@pytest.fixture(scope="session")
def sentiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder. Not to be written to."""
    return make_data(tmp_path_factory.mktemp("data") / "sentiment")


@pytest.fixture
def llama4_copy(llama4: Path, tmp_path: Path) -> Path:
    """A GPTQ folder of the test's own, to damage."""
    return shutil.copytree(llama4, tmp_path / "model")


@pytest.fixture
def recipe(tmp_path: Path, llama4: Path, sentiment: Path) -> str:
    """A recipe file for six steps on them, its run in tmp_path/run."""
    return write_recipe(tmp_path / "recipe.yaml", llama4, sentiment)


def step_without_waiting(graphs, batches):
    """Three steps, which warm up and capture, and four in which nothing may wait for the CUDA device."""
    for _ in range(3):
        graphs.step(batches)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            graphs.step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
