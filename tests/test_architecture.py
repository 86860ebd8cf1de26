"""The rules of the house, kept by reading the source."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for folder in ("qzo", "kernels", "scripts", "recipes") for p in (ROOT / folder).rglob("*.py"))
SCRIPTS = [p for p in sorted((ROOT / "scripts").iterdir()) if p.is_file() and p.read_bytes()[:40].startswith(b"#!/usr/bin/env python")]
ALL = SOURCES + SCRIPTS
MAX_LINES, MAX_FUNCTION = 300, 60

# Layer of each module: a module imports only from layers below its own (or its own package).
LAYERS = [
    {"errors", "plain_yaml", "conflicts"},
    {"recipe", "memory", "progress", "signals", "disk", "charts"},
    {"journal"},
    {"checkpoint", "metrics", "model", "zo"},
    {"register", "trainer"},
    {"data"},
    {"evaluate", "quantize", "run", "inputs", "estimate", "peft_export"},
    {"rebuild", "report_html", "track"},
    {"report", "replay", "fit", "latent_export"},
    {"card", "hub"},
    {"tune", "export"},
    {"score", "plan", "doctor", "harness"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# `zo` moves the scales of model/linear and the latents of model/qat, and nothing of model knows zo.
ZO_MAY = {"zo", "model.linear", "model.qat"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
                base = ".".join([*package, base]).rstrip(".")
            found.append(base)
            found += [f"{base}.{alias.name}" for alias in node.names] if base == "qzo" else []
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_files_and_functions_are_small(path: Path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") < MAX_LINES
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION, f"{node.name} at line {node.lineno}"


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_nothing_dangerous(path: Path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except at line {node.lineno}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load"), f"line {node.lineno}"
            for keyword in node.keywords:
                assert keyword.arg != "trust_remote_code" or ast.unparse(keyword.value) == "False"
    assert not {"pickle", "cloudpickle", "dill", "joblib"} & {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_no_commented_out_code(path: Path):
    code = re.compile(r"^\s*#\s*(import \w|from \w+ import|def \w+\(|return\b.*[\(\[]|\w+ = .*[\(\[]|if .*:$|for .* in .*:$|print\()")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if code.match(line)]
    assert not lines


@pytest.mark.parametrize("path", [p for p in SOURCES if p.is_relative_to(ROOT / "qzo")], ids=name_of)
def test_imports_point_downwards(path: Path):
    parts = path.relative_to(ROOT / "qzo").with_suffix("").parts
    own = parts[0]
    if own in ("__init__", "embedded"):
        return
    used = {name.removeprefix("qzo.") for name in imports(path) if name.startswith("qzo.")}
    assert not {name.split(".")[0] for name in used} & {"cli", "scripts"}
    for name in used:
        other = name.split(".")[0]
        assert other == own or RANK[other] < RANK[own] or (own == "zo" and name in ZO_MAY), f"{own} imports {name}"


def test_zo_and_kernels_stand_alone():
    allowed_zo = {"torch", "numpy", "qzo_kernels", "qzo"}
    for path in (ROOT / "qzo" / "zo").rglob("*.py"):
        tops = {name.split(".")[0] for name in imports(path)}
        assert not tops & {"transformers", "datasets", "safetensors", "tokenizers"}, name_of(path)
        ours = {name.removeprefix("qzo.") for name in imports(path) if name.startswith("qzo.")}
        assert all(name.split(".")[0] == "zo" or name in ZO_MAY for name in ours), (name_of(path), ours)
        assert tops & allowed_zo or path.name in ("__init__.py", "schedule.py")
    for path in (ROOT / "kernels").glob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"qzo", "transformers", "numpy"}, name_of(path)


def test_one_file_goes_backwards():
    """ZeroQAT begins with a first-order reconstruction of each layer; it is optional, says so, and is the only place with gradients."""
    calls = re.compile(r"\.backward\(|autograd|enable_grad|requires_grad_\(\)|requires_grad=True")
    found = [name_of(path) for path in SOURCES if path.is_relative_to(ROOT / "qzo") and calls.search(path.read_text(encoding="utf-8"))]
    assert found == ["qzo/quantize/reconstruct.py"]


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "transformers would import it as the PyPI package `kernels`"


def test_top_level_is_fixed():
    tracked = {p.name for p in ROOT.iterdir()} - {".git", ".venv", ".pytest_cache", "runs", "build", "dist", ".carry", ".ci-venv"}
    expected = {"pyproject.toml", "README.md", "qzo", "kernels", "recipes", "tests", "scripts", ".ci", "constraints.txt", "results",
                ".gitignore", "LICENSE"}  # fmt: skip
    assert {name for name in tracked if not name.endswith(".egg-info")} <= expected


def test_every_test_file_has_a_name_of_its_own():
    """Of two with one name pytest collects the first alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(names)


def test_every_listed_package_is_a_folder():
    import tomllib

    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {"qzo"} | {f"qzo.{'.'.join(p.parent.relative_to(ROOT / 'qzo').parts)}" for p in (ROOT / "qzo").rglob("*/__init__.py")}
    assert folders | {"qzo.recipes", "qzo_kernels"} == set(setup["packages"])
