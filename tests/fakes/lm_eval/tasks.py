"""Tasks of YAML files in a folder; without one, a single name that stands for the built-in ones."""

from pathlib import Path

import yaml


class TaskManager:
    def __init__(self, include_path: str | list | None = None, include_defaults: bool = True):
        folders = include_path if isinstance(include_path, list) else [include_path] if include_path else []
        configs = [yaml.safe_load(path.read_text()) for folder in folders for path in sorted(Path(folder).glob("*.yaml"))]
        self.index = {config["task"]: config for config in configs} | ({"arc_easy": {}} if include_defaults else {})
        self.all_subtasks = list(self.index)

    def match_tasks(self, names: list) -> list:
        return [name for name in names if name in self.index]
