"""lm-evaluation-harness for tests: the package (700 MB with what it needs) where it is installed, elsewhere a small one with its interface."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TASK = """task: tiny_sentiment
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}/validation.jsonl
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{sentence}}}} It was"
doc_to_choice: ["terrible", "great"]
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def tasks(tmp_path: Path, sentiment: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one task, and `lm_eval` to import."""
    if find_spec("lm_eval") is None:
        monkeypatch.syspath_prepend(str(Path(__file__).parent / "fakes"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(TASK.format(data=sentiment))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        del sys.modules[name]
