"""What a run reads before any weight: the model's folder, the data as token ids."""

import sys
from collections.abc import Sequence

from qzo.data.encode import Encoded, encode_examples
from qzo.data.generation import encode_questions
from qzo.data.messages import encode_chats
from qzo.data.tasks import Example, Task, get_task, load_examples
from qzo.data.text import Windows, read_windows
from qzo.errors import BadInput
from qzo.model.files import Folder
from qzo.model.formats import Quantization, read_config
from qzo.model.load import skeleton
from qzo.model.packed_format import PackedConfig
from qzo.model.zeroqat_format import LatentConfig, latent_config
from qzo.recipe import Recipe


def task_of(recipe: Recipe) -> Task:
    return get_task(recipe.task, recipe.prompt, recipe.choices, recipe.label, recipe.completion)


def check_objective(objective: str, task: Task) -> None:
    """Raises BadInput for a task on which the objective cannot be measured."""
    if objective == "accuracy" and (task.generation or task.chat or task.text):
        raise BadInput("recipe, objective", f"accuracy, with task {task.name}", "a task with choices", "Set objective=loss, or give choices.")
    if objective == "f1" and not task.generation:
        raise BadInput("recipe, objective", f"f1, with task {task.name}", "a task whose answer is generated: squad, or jsonl with a completion",
                       "Set objective=loss.")  # fmt: skip


def quantized_folder(recipe: Recipe) -> tuple[Folder, Quantization]:
    """The model's folder and its quantization. Raises BadInput for a recipe or a model that cannot be tuned."""
    if recipe.stacked and recipe.dense:
        raise BadInput("recipe, stacked", "true together with dense: true", "one of the two", "Set stacked=false.")
    folder = Folder(recipe.model)
    latent = latent_config(folder)
    if latent is not None or recipe.method == "zeroqat":
        _check_latent(recipe, latent)
        skeleton(folder)
        return folder, latent
    config = read_config(folder)
    if config is None:
        raise BadInput(recipe.model, "a model that is not quantized", "a GPTQ, AWQ, AQLM, compressed-tensors or bitsandbytes checkpoint",
                       f"Quantize it first: qzo quantize {recipe.model} -o OUT, then model=OUT.")  # fmt: skip
    for key, value in (("activations", recipe.activations), ("method", "quzo" if recipe.method == "quzo" else None)):
        if value and config.codebook:
            raise BadInput(f"recipe, {key}", f"{value} with NF4, FP4 or AQLM weights, whose codes name entries of a table", "weights on a uniform grid",
                           f"Leave {key} out, or use a GPTQ, AWQ, compressed-tensors or LLM.int8 model.")  # fmt: skip
    if isinstance(config, PackedConfig) and (recipe.method == "quzo" or recipe.activations and config.activations < 16):
        key, value = ("method", "quzo") if recipe.method == "quzo" else ("activations", recipe.activations)
        raise BadInput(f"recipe, {key}", f"{value} with a packed checkpoint of {config.width}-bit weights and {config.activations}-bit activations",
                       "method: qzo or quzo-lora, and the activations that the checkpoint itself has", f"Leave {key} out.")  # fmt: skip
    if recipe.activations == "fp8" and config.bits == 8:
        raise BadInput("recipe, activations", "fp8 with a model of 8 bits", "int8, which multiplies such codes as they are", "Set activations=int8.")
    if recipe.activations and config.group_size != -1 and config.group_size % 32:
        raise BadInput("recipe, activations", f"{recipe.activations} with groups of {config.group_size}", "groups of a multiple of 32")
    skeleton(folder)
    return folder, config


def _check_latent(recipe: Recipe, config: LatentConfig | None) -> None:
    """Raises BadInput for a latent checkpoint with another method, for another checkpoint with zeroqat, and for parts of the quantizer it lacks."""
    if config is None:
        raise BadInput(recipe.model, "no latent checkpoint, with method: zeroqat", "16-bit weights and their quantizer",
                       "Make one of the 16-bit model: qzo quantize MODEL_16 -o OUT --method zeroqat --calibration FILE; then model=OUT.")  # fmt: skip
    if recipe.method != "zeroqat":
        raise BadInput(recipe.model, f"a latent checkpoint of ZeroQAT, with method: {recipe.method}", "method: zeroqat",
                       "Set method=zeroqat, or export it first: qzo export … --format packed.")  # fmt: skip
    lacking = [("span", config.activations == 16, "activations of 16 bits"), *((part, not config.smoothing, "no smoothing") for part in ("scale", "shift"))]
    for part, absent, why in lacking:
        if absent and part in recipe.quantizer:
            raise BadInput("recipe, quantizer", f"{part}, of a model with {why}", f"a part that {recipe.model} has")


def load_data(recipe: Recipe, tokenizer: object, max_length: int) -> tuple[Sequence[Encoded], Sequence[Example] | Windows, Task]:
    """Training examples as token ids, evaluation examples (of a text its windows), and the task. Warns about prompts that were cut."""
    task = task_of(recipe)
    check_objective(recipe.objective, task)
    if task.text:
        splits = ((recipe.train_split, recipe.train_examples), (recipe.eval_split, recipe.eval_examples))
        train, validation = (read_windows(recipe.data, split, tokenizer, max_length, count, recipe.streaming) for split, count in splits)
        return train, validation, task
    train = load_examples(task, recipe.data, recipe.train_split, recipe.train_examples, recipe.streaming)
    encode = encode_questions if recipe.objective == "f1" else encode_chats if task.chat else encode_examples
    encoded, truncated = encode(train, tokenizer, max_length)
    if truncated:
        print(f"warning: {truncated} of {len(train)} {'chats' if task.chat else 'prompts'} lost their beginning (max_length={max_length})", file=sys.stderr)
    return encoded, load_examples(task, recipe.data, recipe.eval_split, recipe.eval_examples, recipe.streaming), task
