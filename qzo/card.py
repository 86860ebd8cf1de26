"""README.md of an exported model: what it is, how good it was before and after, how it was made, how to load it."""

import re
from pathlib import Path
from typing import Any

from qzo import plain_yaml
from qzo.metrics import read_metrics
from qzo.model.files import BUILTIN, Folder
from qzo.report import results, table
from qzo.run import RunFolder

# Where and how often something was written: nothing of the model.
_LOCAL = ("output_dir", "device_memory", "log_every", "save_every", "track", "offload", "threads")
_LOAD = {
    "hf": "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained({where})",
    "zeroqat": "import qzo\n\nmodel = qzo.load_model({where}).model",
    "peft": "from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, {where})",
}
_LOAD_QUANTIZED = """import qzo  # lets transformers read the format without further packages
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({where})"""


def licence(folder: Folder) -> str | None:
    """What the model's README.md (its YAML head) or config.json says under `license`; None where neither does."""
    found = None
    try:
        text = (folder.path / "README.md").read_text(encoding="utf-8", errors="replace")
        head = re.match(r"---\r?\n(.*?\n)---\s", text, re.DOTALL)
        found = plain_yaml.parse(head[1])[0].get("license") if head else None
    except (OSError, plain_yaml.NotPlainYaml, AttributeError):
        pass
    found = found or folder.config.get("license")
    return found if isinstance(found, str) and found else None


def model_card(run: str, header: dict[str, Any], folder: Folder, repo: str | None, format: str, steps: int) -> str:
    """The text of README.md for an export in `format` of the first `steps` steps of a run; repo: its hub id, where it has one.

    Folders of this machine are named by their last part alone, and the export's own is not: its bytes do not depend on it.
    """
    recipe, given = header["recipe"], licence(folder)
    base = _public(header["base"]["model"])
    head = {"library_name": "peft" if format == "peft" else "transformers", "pipeline_tag": "text-generation", "tags": ["qzo", format]}
    head |= {"base_model": base} if _is_hub_id(header["base"]["model"]) else {}
    head |= {"license": given} if given else {}
    moved = ", ".join(f"{len(group['tensors'])} {group['name']} tensors" for group in header["groups"])
    rows = "".join(f"| {key} | {_shown(key, value)} |\n" for key, value in recipe.items() if key not in _LOCAL)
    versions = ", ".join(f"{package} {version}" for package, version in header["versions"].items())
    return f"""---
{plain_yaml.dump(head)}---

# {repo.rpartition("/")[2] if repo else header["recipe_name"]}

{base}, tuned with qzo {header["versions"]["qzo"]}, without a backward pass: {moved} moved in {steps} steps.

{_figures(run, steps)}

## Load

```python
{_LOAD.get(format, _LOAD_QUANTIZED).format(where=repr(repo) if repo else 'FOLDER')}
```

## Recipe

| key | value |
| --- | --- |
{rows}
## Origin

- base model: {base}, SHA-256 of its weights {header["base"]["sha256"]}
- licence: {f"{given}, as the base model says" if given else "the base model's folder names none; the terms of the base model hold"}
- SHA-256 of the training examples: {header["data_sha256"]}
- made on: {header["device"]}, {header["dtype"].removeprefix("torch.")}
- versions: {versions}
"""


def _figures(run: str, steps: int) -> str:
    """Before and after; only the evaluation of these very weights is shown."""
    folder = RunFolder(Path(run))
    lines = read_metrics(folder.metrics)
    evaluations = {line["after"]: line["evaluation"] for line in lines if "evaluation" in line}
    if steps not in evaluations:
        return f"Not evaluated after step {steps}."
    count = evaluations[steps].get("examples")
    seconds = next((line["seconds"] for line in lines if line.get("step") == steps - 1), 0.0)
    shown = table({**results(folder), "before": evaluations.get(0), "after": evaluations[steps], "steps": steps, "seconds": seconds})
    return f"{shown}\n\nOn {count} examples of the evaluation split in the recipe."


def _is_hub_id(model: str) -> bool:
    return not model.startswith((BUILTIN, "/", ".", "~")) and model.count("/") == 1 and not Path(model).exists()


def _public(value: str) -> str:
    """A name without the folders of this machine before it."""
    return value if value.startswith(BUILTIN) or _is_hub_id(value) else Path(value).name


def _shown(key: str, value: Any) -> str:
    text = _public(value) if key in ("model", "data") else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
