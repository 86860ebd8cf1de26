"""Model folders that cannot be tuned: refused before the first step, by the name of the file, tensor or key."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import edit_json, write_recipe

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj"


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / WEIGHTS)


def cut(name):
    """Take the last row of a tensor away."""
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name][:-1]}))


def drop(*names):
    return lambda folder: edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in names])


def put(name, make):
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({name: make(tensors[name])}))


def config(**keys):
    return lambda folder: edit_json(folder / "config.json", **keys)


def quantization(**keys):
    def change(folder):
        old = json.loads((folder / "config.json").read_text())["quantization_config"]
        edit_json(folder / "config.json", quantization_config={k: v for k, v in {**old, **keys}.items() if v is not None})

    return change


def compressed(layout="pack-quantized", groups=None, sparse=None, **keys):
    """A compressed-tensors config: `keys` of its group, or else of the group's weights."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "input_activations": None, "weights": weights}
    for key, value in keys.items():
        (group if key in group else weights)[key] = value
    groups = {"group_0": group} if groups is None else groups
    method = {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "sparsity_config": sparse}
    return config(quantization_config={**method, "kv_cache_scheme": keys.get("kv_cache_scheme")})


def write(name, text):
    return lambda folder: (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def truncate(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def index(**extra):
    """An index that lists every tensor of the one file; `extra` goes on top ({} for a tensor that is not there)."""

    def change(folder):
        weight_map = dict.fromkeys(load_file(folder / WEIGHTS), WEIGHTS)
        (folder / INDEX).write_text(json.dumps({"weight_map": {**weight_map, **extra}}))

    return change


def pickled(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def only_in_quantize_config(text):
    def change(folder):
        edit_json(folder / "config.json", quantization_config=None)
        (folder / "quantize_config.json").write_text(text)

    return change


NAN = put(f"{Q}.scales", lambda t: t.index_fill(0, torch.tensor([1]), float("nan")))
INFINITE = put(f"{Q}.scales", lambda t: t.index_fill(0, torch.tensor([0]), float("inf")))
LOWERCASE = {"type": "Lowercase"}

CASES = {
    # weights
    "missing shard": (index(**{"lm_head.weight": "model-2.safetensors"}), ["model-2.safetensors: missing shard", "the index names"]),
    "truncated shard": (truncate, [WEIGHTS, "not a whole safetensors file", "Download it again"]),
    "empty shard": (write(WEIGHTS, ""), [WEIGHTS, "not a whole safetensors file"]),
    "no weights": (remove(WEIGHTS), ["no weights; expected model.safetensors"]),
    "pickle": (pickled, ["only pickled weights (pytorch_model.bin)", "safetensors", "Pickles run code"]),
    "two files": (lambda f: [shutil.copy(f / WEIGHTS, f / "b.safetensors"), (f / WEIGHTS).rename(f / "a.safetensors")], ["2 safetensors files and no index"]),
    "parent path": (index(**{"lm_head.weight": "../x.safetensors"}), [INDEX, "'../x.safetensors'", "inside the folder"]),
    "absolute path": (index(**{"lm_head.weight": "/etc/x.safetensors"}), [INDEX, "'/etc/x.safetensors'", "inside the folder"]),
    "subfolder": (index(**{"lm_head.weight": "a/x.safetensors"}), [INDEX, "'a/x.safetensors'", "inside the folder"]),
    "pickled shard": (index(**{"lm_head.weight": "x.bin"}), [INDEX, "'x.bin'", "a .safetensors file"]),
    "index lists too much": (index(**{"lm_head.bias": WEIGHTS}), [f"{WEIGHTS}: lacks lm_head.bias"]),
    "index without map": (write(INDEX, "{}"), [INDEX, "no weight_map"]),
    "broken index": (write(INDEX, "{"), [INDEX, "cannot be read"]),
    # tensors
    "qweight shape": (cut(f"{Q}.qweight"), [f"{Q}.qweight: shape [7, 64]; expected [8, 64]", "bits or group_size"]),
    "qzeros shape": (cut(f"{Q}.qzeros"), [f"{Q}.qzeros: shape [1, 8]; expected [2, 8]"]),
    "scales shape": (cut(f"{Q}.scales"), [f"{Q}.scales: shape [1, 64]; expected [2, 64]"]),
    "g_idx shape": (cut(f"{Q}.g_idx"), [f"{Q}.g_idx: shape [63]; expected [64]"]),
    "norm shape": (cut("model.norm.weight"), ["model.norm.weight: shape [63]; expected [64]"]),
    "embedding shape": (cut("model.embed_tokens.weight"), ["model.embed_tokens.weight: shape"]),
    "uneven groups": (put(f"{Q}.g_idx", torch.zeros_like), [f"{Q}.g_idx: groups of unequal size", "groups of 32"]),
    "groups that are not there": (put(f"{Q}.g_idx", lambda t: t + 1), [f"{Q}.g_idx: groups of unequal size"]),
    "qweight dtype": (put(f"{Q}.qweight", torch.Tensor.long), [f"{Q}.qweight: torch.int64; expected int32"]),
    "scales dtype": (put(f"{Q}.scales", torch.Tensor.int), [f"{Q}.scales: torch.int32; expected int32, and floating-point scales"]),
    "missing scales": (drop(f"{Q}.scales"), [f"no tensor {Q}.scales", "incomplete"]),
    "missing weight": (drop(f"{Q}.qweight"), [f"no tensor {Q}.qweight", "incomplete"]),
    "missing norm": (drop("model.norm.weight"), ["no tensor model.norm.weight"]),
    "nan scales": (NAN, [f"{Q}.scales: infinities or NaN"]),
    "infinite scales": (INFINITE, [f"{Q}.scales: infinities or NaN"]),
    # quantization_config
    "format": (quantization(checkpoint_format="gptq_v3"), ["config.json", "format 'gptq_v3'", "gptq or gptq_v2"]),
    "hqq": (quantization(quant_method="hqq"), ["config.json", "format 'hqq'; expected one of gptq, awq, compressed-tensors"]),
    "bitsandbytes": (quantization(quant_method="bitsandbytes"), ["bitsandbytes with neither load_in_8bit nor load_in_4bit"]),
    "method a number": (quantization(quant_method=4), ["format 4; expected one of gptq"]),
    "method a list": (quantization(quant_method=["gptq"]), ["format ['gptq']; expected one of gptq"]),
    "awq of a gptq file": (quantization(quant_method="awq"), ["AWQ in the layout 'gptq'; expected gemm"]),
    "awq without a layout": (quantization(quant_method="awq", checkpoint_format=None), [f"{Q}.qweight: shape [8, 64]; expected [64, 8]"]),
    "awq gemv": (quantization(quant_method="awq", version="gemv"), ["AWQ in the layout 'gemv'; expected gemm", "version gemm"]),
    "awq marlin": (quantization(quant_method="awq", version="marlin"), ["AWQ in the layout 'marlin'; expected gemm"]),
    "awq 8 bits": (quantization(quant_method="awq", checkpoint_format=None, bits=8), ["bits 8; expected 4, the only width of AWQ gemm"]),
    "awq no group size": (quantization(quant_method="awq", checkpoint_format=None, group_size=None), ["group_size None; expected a positive"]),
    "compressed of a gptq file": (compressed(), ["a quantization config and no quantized tensor; expected weight_packed"]),
    "compressed fp8": (compressed(layout="float-quantized"), ["compressed-tensors in the layout 'float-quantized'; expected pack-quantized"]),
    "compressed no groups": (compressed(groups={}), ["config_groups []; expected one group"]),
    "compressed two groups": (compressed(groups={"a": {}, "b": {}}), ["config_groups ['a', 'b']; expected one group"]),
    "compressed preset": (compressed(groups={"W4A16": ["Linear"]}), ["config_groups ['W4A16']; expected one group, an object"]),
    "compressed activations": (compressed(input_activations={"num_bits": 8}), ["group_0: input_activations: quantized activations", "null"]),
    "compressed targets": (compressed(targets=["re:.*mlp.*"]), ["targets ['re:.*mlp.*']; expected ['Linear']", "ignore"]),
    "compressed no weights": (compressed(weights=None), ["group_0, weights: NoneType; expected an object"]),
    "compressed 3 bits": (compressed(num_bits=3), ["bits 3; expected 4 or 8"]),
    "compressed float": (compressed(type="float"), ["type 'float'; expected int"]),
    "compressed block": (compressed(strategy="block"), ["strategy 'block'; expected group or channel"]),
    "compressed dynamic": (compressed(dynamic=True), ["dynamic True; expected false"]),
    "compressed no size": (compressed(group_size=None), ["group_size None; expected a positive"]),
    "compressed sparse": (compressed(sparse={"format": "sparse-24-bitmask"}), ["sparsity_config: weights that are packed as sparse"]),
    "compressed kv cache": (compressed(kv_cache_scheme={"num_bits": 8}), ["kv_cache_scheme: a model that computes in another way"]),
    "marlin": (quantization(checkpoint_format="marlin"), ["format 'marlin'"]),
    "marlin flag": (quantization(is_marlin_format=True), ["format 'marlin'"]),
    "bits 5": (quantization(bits=5), ["bits 5; expected 2, 3, 4 or 8"]),
    "bits text": (quantization(bits="4"), ["bits '4'; expected 2, 3, 4 or 8"]),
    "bits 4.0": (quantization(bits=4.0), ["bits 4.0; expected 2, 3, 4 or 8"]),
    "no bits": (quantization(bits=None), ["bits None"]),
    "other bits": (quantization(bits=8), [f"{Q}.qzeros: shape [2, 8]; expected [2, 16]", "do not fit these weights"]),
    "group size 0": (quantization(group_size=0), ["group_size 0"]),
    "other group size": (quantization(group_size=64), [f"{Q}.scales: shape [2, 64]; expected [1, 64]"]),
    "dynamic": (quantization(dynamic={"-:lm_head": {}}), ["dynamic"]),
    "pack_dtype": (quantization(pack_dtype="int16"), ["pack_dtype 'int16'; expected int32"]),
    "not an object": (config(quantization_config=[4]), ["quantization_config: list; expected an object"]),
    "broken quantize_config": (only_in_quantize_config("{"), ["quantize_config.json: cannot be read"]),
    # config.json
    "no config": (remove("config.json"), ["config.json: missing"]),
    "broken config": (write("config.json", "{'a'}"), ["config.json: cannot be read"]),
    "config of bytes": (write("config.json", "\udcff\udcfe"), ["config.json: cannot be read"]),
    "config a list": (write("config.json", "[]"), ["config.json: list; expected a JSON object"]),
    "model_type": (config(model_type="mixtral"), ["model_type 'mixtral'", "llama, mistral, qwen2, qwen3, opt"]),
    "no model_type": (config(model_type=None), ["model_type None"]),
    "auto_map": (config(auto_map={"AutoModelForCausalLM": "modeling.Mine"}), ["auto_map", "never run"]),
    "text for a number": (config(hidden_size="64"), ["config.json: Validation error", "'hidden_size' expected int, got str"]),
    "no heads": (config(num_attention_heads=0), ["config.json: integer modulo by zero"]),
    "no layers": (config(num_hidden_layers=-1), ["a quantization config and no quantized tensor"]),
    "negative width": (config(hidden_size=-64), ["config.json"]),
    "more layers": (config(num_hidden_layers=2), ["no tensor model.layers.1."]),
    "other width": (config(intermediate_size=96), ["mlp.gate_proj.scales: shape [2, 88]; expected [2, 96]"]),
    # tokenizer
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), ["no tokenizer files", "Copy the tokenizer's files"]),
    "broken tokenizer": (write("tokenizer.json", "{"), ["tokenizer"]),
    "large tokenizer": (lambda f: [config(vocab_size=100)(f), put("model.embed_tokens.weight", lambda t: t[:100])(f)], ["vocabulary of", "model's 100"]),
    "tokenizer code": (
        lambda f: edit_json(f / "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]}),
        ["tokenizer"],
    ),
    "options alike": (lambda f: edit_json(f / "tokenizer.json", normalizer=LOWERCASE), ["train.jsonl line", "cannot tell apart the options ' Great' and ' great'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_model_folder(case, llama4_copy, sentiment, tmp_path, refused):
    damage, says = CASES[case]
    damage(llama4_copy)
    choices = '[" Great", " great"]' if case == "options alike" else '[" terrible", " great"]'
    recipe = write_recipe(tmp_path / "recipe.yaml", llama4_copy, sentiment, choices=choices)
    refused("tune", recipe, says=says)
    assert not (tmp_path / "run").exists()


def test_missing_folder(recipe, refused):
    refused("tune", recipe, "model=/no/such/folder", says=["/no/such/folder: no such file or folder", "hub id like org/name"])
    refused("evaluate", "nowhere", "--task", "sst2", "--data", "x", says="x: no such file or folder")


def test_a_file_for_a_folder(recipe, llama4, refused):
    refused("tune", recipe, f"model={llama4}/config.json", says=["config.json: a file; expected a model folder"])


def test_unknown_builtin(recipe, refused):
    refused("tune", recipe, "model=builtin:nothing", says="builtin:nothing: nothing of that name ships with qzo")
    refused("tune", recipe, "model=builtin:../recipe.py", says="nothing of that name ships with qzo")


def test_16_bit_model(recipe, llama16, refused):
    for extra in ([], ["--dry-run"]):
        refused("tune", recipe, f"model={llama16}", *extra, says=["not quantized", f"qzo quantize {llama16} -o OUT"])


QUANTIZE = {
    "quantized": ({}, [], "already quantized; expected a 16-bit model"),
    "no calibration": ({}, ["--method", "gptq"], "Give --calibration FILE, or --method rtn"),
    "mixture of experts": ({"model_type": "mixtral", "num_local_experts": 2}, [], "model_type 'mixtral'"),
    "three bits": ({}, ["--bits", "3"], "mlp.gate_proj: a weight of 88×64; expected multiples of 32 at 3 bits"),
    "five bits": ({}, ["--bits", "5"], "argument --bits: invalid choice"),
    "custom code": ({"auto_map": {"AutoConfig": "x.Y"}}, [], "auto_map"),
}


@pytest.mark.parametrize("case", QUANTIZE)
def test_quantize(case, llama16, llama4, tmp_path, refused):
    keys, arguments, says = QUANTIZE[case]
    model = shutil.copytree(llama4 if case == "quantized" else llama16, tmp_path / "model")
    edit_json(model / "config.json", **keys)
    method = [] if "--method" in arguments else ["--method", "rtn"]
    refused("quantize", model, "-o", tmp_path / "out", "--device", "cpu", *method, *arguments, says=says)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_no_cuda(recipe, refused):
    if torch.cuda.is_available():
        return
    refused("tune", recipe, "device=cuda", says=["device: cuda", "qzo doctor"])
