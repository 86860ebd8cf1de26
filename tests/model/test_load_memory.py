"""Loading goes tensor by tensor: the host never holds more than the quantized model and one decoder layer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

MB = 1 << 20
SLACK = 16 * MB
GROUP = 128

CHILD = """
import sys, threading, time
import torch, transformers.models.llama.modeling_llama
from qzo.memory import host_anonymous
from qzo.model.load import load_model
torch.set_num_threads(1)
load_model(sys.argv[1], "cpu", "fp16")
before, peak, done = host_anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, host_anonymous())
        time.sleep(0.0005)
thread = threading.Thread(target=watch)
thread.start()
loaded = load_model(sys.argv[2], "cpu", "fp16")
done = True
thread.join()
tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*loaded.model.parameters(), *loaded.model.buffers()]}
print(peak - before, sum(tensors.values()))
"""


def write_random_gptq(folder: Path, hidden: int, inner: int, layers: int, desc_act: bool = False) -> int:
    """A Llama of random 4-bit codes, written without a 16-bit model; returns the bytes of one layer in 16 bits."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.zeros(64, hidden).half(), "lm_head.weight": torch.zeros(64, hidden).half(),
               "model.norm.weight": torch.ones(hidden).half()}  # fmt: skip
    attention = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    mlp = {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    one = {f"{norm}.weight": torch.ones(hidden).half() for norm in ("input_layernorm", "post_attention_layernorm")}
    for linear, (rows, cols) in (attention | mlp).items():
        groups, g_idx = -(-cols // GROUP), torch.arange(cols, dtype=torch.int32) // GROUP
        one |= {
            f"{linear}.qweight": torch.randint(-(2**31), 2**31, (cols // 8, rows), generator=generator).to(torch.int32),
            f"{linear}.qzeros": torch.full((groups, rows // 8), 0x77777777, dtype=torch.int32),
            f"{linear}.scales": torch.full((groups, rows), 0.01).half(),
            f"{linear}.g_idx": g_idx[torch.randperm(cols, generator=generator)] if desc_act else g_idx,
        }
    tensors |= {f"model.layers.{i}.{name}": value.clone() for i in range(layers) for name, value in one.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": desc_act},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return 2 * sum(rows * cols for rows, cols in (attention | mlp).values())


def measure(tmp_path: Path, hidden: int, inner: int, layers: int, desc_act: bool) -> None:
    write_random_gptq(tmp_path / "warm", 128, 256, 1)
    one_layer = write_random_gptq(tmp_path / "model", hidden, inner, layers, desc_act)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "warm"), str(tmp_path / "model")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    peak, quantized = map(int, result.stdout.split())
    assert quantized < 1.1 * one_layer * layers / 4, "codes are kept packed"
    assert peak <= quantized + one_layer + SLACK, f"{peak / MB:.0f} MB, {quantized / MB:.0f} of them the model, a layer {one_layer / MB:.0f}"


def test_host_memory_while_loading(tmp_path):
    """With the columns in order of activation size, whose codes are packed anew."""
    measure(tmp_path, 1024, 2816, 8, True)


@pytest.mark.campaign
@pytest.mark.parametrize("desc_act", [False, True])
def test_host_memory_while_loading_a_larger_model(tmp_path, desc_act):
    measure(tmp_path, 2048, 5632, 16, desc_act)
