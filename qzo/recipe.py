"""The recipe of a run: one flat schema, read from YAML with key=value overrides; every problem is reported at once."""

import difflib
import importlib.resources
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from qzo import plain_yaml
from qzo.conflicts import Problem, conflicts, line, show
from qzo.errors import BadInput

# A run may be resumed with other values of these: they decide where and how often something is written or shown, or where
# tensors are kept, and no bit of a loss or of the tuned weights. `steps` is not among them: the schedule depends on it.
_FREE_KEYS = ("output_dir", "log_every", "save_every", "eval_every", "device_memory", "offload", "track")
# These decide in which pieces a step is measured: the same losses, but for rounding. A run that ran out of memory
# may go on with smaller ones.
PIECES = ("micro_batch", "stacked")

# What other trainers call some keys; by spelling alone these would lead to the wrong one.
_OTHER_NAMES = {"learning_rate": "lr", "zo_eps": "eps", "max_steps": "steps", "num_steps": "steps"}


def _plain_text(value: str) -> str:
    if "\0" in value:
        raise ValueError("a NUL character")
    return value


_Text = Annotated[str, Field(min_length=1), AfterValidator(_plain_text)]
_Count = Annotated[int, Field(ge=1)]
_Rate = Annotated[float, Field(ge=0)]
_Positive = Annotated[float, Field(gt=0)]


class Recipe(BaseModel):
    """Everything a run depends on. Types are strict; all numbers are finite; steps count from 0.

    Raises pydantic.ValidationError when built directly; `load_recipe` turns that into one BadInput.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    model: _Text = Field(description="model folder, hub id or builtin:NAME")
    task: _Text = Field("jsonl", description="built-in task name, jsonl for any prompt and answer, messages for chats, or text for plain text")
    data: _Text = Field(description="folder of SPLIT.jsonl files, one .jsonl file, or a hub dataset id; of a text also SPLIT.txt files, or one")
    prompt: _Text | None = Field(None, description="prompt template with {field} names (task jsonl)")
    choices: list[_Text] | None = Field(None, description="answers to choose from; may hold {field} names")
    label: _Text | None = Field(None, description="field that holds the right choice, as its index or its text")
    completion: _Text | None = Field(None, description="template or field of the answer, instead of choices and label")
    train_split: _Text = Field("train", description="split to tune on")
    eval_split: _Text = Field("validation", description="split to evaluate on")
    train_examples: _Count | None = Field(1000, description="examples to tune on; null: all")
    eval_examples: _Count | None = Field(None, description="examples to evaluate on; null: all")
    streaming: bool = Field(False, description="train_examples are the first of the split, and nothing behind them is read")
    max_length: int = Field(512, ge=8, description="tokens per row; longer prompts lose their beginning; of a text, per window")
    objective: Literal["loss", "accuracy", "f1"] = Field(
        "loss", description="what a step measures: the loss; minus the accuracy of the choices; minus the F1 of generated answers"
    )
    method: Literal["qzo", "quzo", "quzo-lora", "zeroqat"] = Field(
        "qzo", description="what moves: scales, integer codes (quzo), adapters (quzo-lora), or latent weights and their quantizer (zeroqat)"
    )
    noise: Literal["rademacher", "gaussian"] = Field("rademacher", description="distribution of a direction z")
    eps_mode: Literal["relative", "absolute", "relative_step"] = Field(
        "relative", description="s * (1 + eps z), or s + eps z; zeroqat: w + eps z, in grid steps (relative_step) or absolute"
    )
    latent_layers: list[_Text] | None = Field(
        None, description="last names of the layers whose weights move, all others packed; []: none; null: all (zeroqat)"
    )
    direction: Literal["latent", "realized"] = Field(
        "latent", description="update along the noise, or along the codes in which the signs differed (zeroqat)"
    )
    quantizer: list[_Text] = Field([], description="what moves of the quantizer: clipping, step, zero, span, scale, shift (zeroqat)")
    quantizer_eps: _Positive = Field(0.03, description="perturbation of the quantizer: a share, or in logits, grid steps, mean shifts (zeroqat)")
    quantizer_lr: _Rate | None = Field(None, description="learning rate of the quantizer (zeroqat)")
    noise_bits: int = Field(4, ge=2, le=8, description="bits of a direction (quzo, quzo-lora)")
    estimator: Literal["rge1", "rge2"] = Field("rge1", description="one rounding of a direction for forward and update, or two (quzo, quzo-lora)")
    feedback: bool = Field(True, description="keep what the rounding of an update leaves over, 2 bytes per weight (quzo)")
    lora_rank: _Count = Field(8, description="rank of the adapters (quzo-lora)")
    lora_alpha: _Positive = Field(16.0, description="adapters count lora_alpha / lora_rank times (quzo-lora)")
    lora_layers: list[_Text] = Field(["q_proj", "v_proj"], min_length=1, description="last names of the layers with adapters (quzo-lora)")
    activations: Literal["int8", "fp8"] | None = Field(None, description="8-bit inputs of the quantized layers; null: 16 bits")
    eps: _Positive = Field(0.03, description="size of the perturbation, in units of eps_mode; quzo: in grid steps; quzo-lora: absolute")
    lr: _Rate = Field(description="learning rate at the top of the schedule")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="course of the learning rate")
    warmup: int = Field(0, ge=0, description="steps over which the learning rate rises to lr")
    steps: _Count = Field(description="steps of the run")
    batch_size: _Count = Field(16, description="examples per step")
    micro_batch: _Count | None = Field(None, description="examples per forward; null: as many of the batch as the memory holds")
    directions: int = Field(1, ge=1, le=64, description="directions per step, averaged")
    clip: _Positive | None = Field(None, description="bound on |d|, the projected gradient")
    clip_median: _Positive | None = Field(None, description="bound on |d| as a multiple of its running median")
    stacked: bool = Field(False, description="run both signs of a direction as one batch")
    dense: bool = Field(False, description="also tune the tensors that are not quantized (norms, biases)")
    dense_lr: _Rate | None = Field(None, description="learning rate of the dense tensors")
    dense_eps: _Positive | None = Field(None, description="absolute perturbation of the dense tensors")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="seed of the noise and of the order of the data")
    eval_every: int = Field(0, ge=0, description="steps between evaluations; 0: only before and after")
    save_every: _Count = Field(100, description="steps between snapshots")
    log_every: _Count = Field(10, description="steps between log lines")
    track: Literal["none", "tensorboard", "wandb", "trackio", "mlflow"] = Field("none", description="tool that shows the run as well")
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field("auto", description="dtype of the activations")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the run takes place")
    device_memory: _Positive | None = Field(None, description="GB (10^9 bytes) of a GPU that the run may use; null: all that is free")
    offload: Literal["none", "embeddings", "codes", "latents"] = Field(
        "none", description="what stays in host memory: the token embeddings; codes, latents: also these, streamed to the GPU (needs stacked)"
    )
    threads: _Count | None = Field(None, description="CPU threads; null: torch's own choice")
    output_dir: _Text | None = Field(None, description="folder of the run; null: runs/NAME-seedSEED")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = conflicts(self.model_dump())
        if problems:
            raise ValueError("; ".join(line(problem) for problem in problems))
        return self


def load_recipe(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a shipped name (no slash, not ending in .yaml) or of a YAML file, with key=value overrides.

    An override's value is read as YAML, except that the value of a text key is taken literally unless it is quoted.
    Raises BadInput: one for all problems, a line each (key, given, expected); or for the file itself, with the line.
    """
    where, text = _find(name_or_path)
    values, problems = _read_yaml(text, where)
    unread = set()
    for override in overrides:
        key, equals, raw = override.partition("=")
        key = key.strip()
        if not equals or not key:
            problems.append((override, "no value", "an override as key=value"))
            continue
        try:
            values[key] = _override_value(key, raw)
        except plain_yaml.NotPlainYaml as error:
            unread.add(key)
            problems.append((key, show(raw), f"a YAML value ({error})"))
    problems += [problem for problem in _problems(values) if problem[0] not in unread]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise BadInput(where, "\n  ".join([f"{count} in the recipe", *map(line, problems)]))
    return Recipe.model_validate(values)


def run_name(name_or_path: str | Path) -> str:
    """Name of a recipe: a shipped name as it is, a file's name without its ending."""
    return Path(name_or_path).stem if _is_file(str(name_or_path)) else str(name_or_path)


def default_output_dir(recipe: Recipe, name: str) -> str:
    """Folder of a run whose recipe names none."""
    return f"runs/{name}-seed{recipe.seed}"


def to_yaml(recipe: Recipe) -> str:
    """All fields in the order of the schema; `load_recipe` reads the same recipe back."""
    return plain_yaml.dump(recipe.model_dump())


def diff(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines `key: old -> new` of two dumped recipes, without the keys that a resumed run may change.

    A key that is younger than the old recipe has its default there.
    """
    lines, fields = [], Recipe.model_fields
    old = old | {key: fields[key].default for key in new if key in fields and key not in old and not fields[key].is_required()}
    for key in {**old, **new}:
        same = key in old and key in new and old[key] == new[key]
        if not same and key not in _FREE_KEYS + PIECES:
            before, after = (show(side[key]) if key in side else "absent" for side in (old, new))
            lines.append(f"{key}: {before} -> {after}")
    return lines


def shipped() -> list[tuple[str, str]]:
    """(name, its first comment line) of every recipe in the package, sorted by name."""
    files = sorted((file for file in _folder().iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return [(file.name.removesuffix(".yaml"), _description(file.read_text("utf-8"))) for file in files]


def shipped_text(name: str) -> str:
    """The YAML of a shipped recipe. BadInput for an unknown name, as in `load_recipe`."""
    return _find(name)[1]


def _description(text: str) -> str:
    comments = (line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#"))
    return next(comments, "")


def _folder() -> Traversable:
    return importlib.resources.files("qzo.recipes")


def _is_file(text: str) -> bool:
    return "/" in text or text.endswith((".yaml", ".yml"))


def _find(name_or_path: str | Path) -> tuple[str, str]:
    name = str(name_or_path)
    if not _is_file(name):
        names = [known for known, _ in shipped()]
        if name not in names:
            names.sort(key=lambda known: -difflib.SequenceMatcher(None, name, known).ratio())
            expected = f"one of {', '.join(names) or '(none shipped)'}"
            raise BadInput("recipe", f"unknown name {show(name)}", expected, "A file is named with ./ or .yaml.")
        return name, (_folder() / f"{name}.yaml").read_text("utf-8")
    try:
        return name, Path(name).read_text("utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise BadInput(name, f"cannot be read ({reason})", "a recipe as a YAML file", "Check the path.") from error


def _read_yaml(text: str, where: str) -> tuple[dict[Any, Any], list[Problem]]:
    try:
        values, repeated = plain_yaml.parse(text)
    except plain_yaml.NotPlainYaml as error:
        place = f"{where}, line {error.line}" if error.line else where
        raise BadInput(place, f"not valid YAML ({error})", "lines of the form key: value") from error
    if not isinstance(values, dict | None):
        raise BadInput(where, f"a YAML {type(values).__name__}", "lines of the form key: value")
    return values or {}, [(key, f"a second time in line {line}", "each key once") for key, line in repeated]


def _override_value(key: str, raw: str) -> Any:
    kinds = _kinds(key) if key in Recipe.model_fields else []
    literal = any(kind.get("type") == "string" and not {"enum", "const"} & kind.keys() for kind in kinds)
    if literal and raw[:1] not in ("'", '"') and raw not in ("", "~", "null"):
        return raw
    return plain_yaml.parse(raw)[0]


def _problems(values: dict[Any, Any]) -> list[Problem]:
    """Problems of single values and, among the values that are right, of values that do not fit together."""
    found: dict[str, Problem] = {}
    for key in values.keys() - Recipe.model_fields.keys():
        nearest = difflib.get_close_matches(str(key).lower(), Recipe.model_fields, n=1, cutoff=0)[0]
        hint = f"a key of the recipe (did you mean {_OTHER_NAMES.get(key, nearest)}?)"
        found[str(key)] = (str(key), "an unknown key", hint)
    known = {key: value for key, value in values.items() if key in Recipe.model_fields}
    try:
        Recipe.model_validate(known)
    except ValidationError as error:
        for problem in error.errors():
            if problem["loc"]:
                key = str(problem["loc"][0])
                found[key] = (key, show(known[key]) if key in known else "nothing", _expected(key))
    defaults = {key: field.default for key, field in Recipe.model_fields.items() if not field.is_required()}
    right = {key: value for key, value in {**defaults, **known}.items() if key not in found}
    order = [str(key) for key in values] + list(Recipe.model_fields)
    return sorted(found.values(), key=lambda problem: order.index(problem[0])) + conflicts(right)


@cache
def _kinds(key: str) -> Sequence[dict[str, Any]]:
    schema = Recipe.model_json_schema()["properties"][key]
    return schema.get("anyOf", [schema])


def _expected(key: str) -> str:
    return " or ".join(_kind(kind) for kind in _kinds(key))


def _kind(kind: dict[str, Any]) -> str:
    if "const" in kind or "enum" in kind:
        return "one of " + ", ".join(kind.get("enum") or [kind["const"]])
    name = {
        "integer": "a whole number", "number": "a finite number", "string": "a text that is not empty",
        "boolean": "true or false", "null": "null", "array": "a list of texts (numbers in quotes)",
    }[kind["type"]]
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<="}
    return " ".join([name, " and ".join(f"{sign} {kind[key]}" for key, sign in bounds.items() if key in kind)]).strip()
