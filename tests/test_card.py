"""The model card of an export, and its way to a hub."""

import re
import shutil

import pytest
import yaml
from fake_hub import TOKEN, hub  # noqa: F401
from huggingface_hub import ModelCard, constants
from tiny_runs import edit_json, write_recipe

from qzo.card import licence
from qzo.cli import main
from qzo.metrics import read_metrics
from qzo.model.files import Folder

HEAD = "---\nlanguage: en\nlicense: apache-2.0\ntags: [a, b]\n---\n# A model\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory, llama4, sentiment):
    """A run of six steps whose base model says its licence."""
    folder = tmp_path_factory.mktemp("card")
    shutil.copytree(llama4, folder / "base-w4")
    (folder / "base-w4" / "README.md").write_text(HEAD)
    assert main(["tune", write_recipe(folder / "recipe.yaml", folder / "base-w4", sentiment)]) == 0
    return folder / "run"


def export(run, out, *options):
    assert main(["export", str(run), "-o", str(out), *options]) == 0
    text = (out / "README.md").read_text()
    return text, ModelCard(text).data.to_dict()


@pytest.mark.parametrize("format", ["gptq", "gptq_v2", "hf"])
def test_what_it_says(format, run, tmp_path):
    text, head = export(run, tmp_path / "tuned-w4", "--format", format)
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["qzo", format], "license": "apache-2.0"}
    before, after = (next(m["evaluation"]["accuracy"] for m in read_metrics(run / "metrics.jsonl") if m.get("after") == at) for at in (0, 6))
    assert re.search(rf"\| accuracy +\| {before:.1%} +\| {after:.1%} +\|", text) and "On 16 examples" in text
    for said in ("# recipe\n", "base-w4, tuned with qzo", "7 scales tensors moved in 6 steps", "| eps | 0.03 |", "| model | base-w4 |", "| data | sentiment |",
                 "torch 2.", "apache-2.0, as the base model says", "from_pretrained(FOLDER)"):  # fmt: skip
        assert said in text
    assert ("import qzo" in text) == (format != "hf")
    assert str(run.parent) not in text and "output_dir" not in text


def test_the_code_in_it_loads_the_model(run, tmp_path):
    text, _ = export(run, tmp_path / "tuned")
    code = compile(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], "README.md", "exec")
    names = {"FOLDER": str(tmp_path / "tuned")}
    exec(code, names)
    assert len([m for m in names["model"].modules() if type(m).__name__ == "QuantLinear"]) == 7


def test_figures_are_those_of_the_exported_step(run, tmp_path):
    from qzo.export import export_run

    export_run(str(run), str(tmp_path / "out"), to=3)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Not evaluated after step 3." in text and "moved in 3 steps" in text and "| accuracy" not in text


CASES = {
    "README": (HEAD, {}, "apache-2.0"), "config": ("# no head", {"license": "mit"}, "mit"), "README first": (HEAD, {"license": "mit"}, "apache-2.0"),
    "nothing": (None, {}, None), "a list": ("---\nlicense: [a]\n---\n", {}, None), "no YAML": ("---\n: [\n---\n", {}, None),
    "a head that is no mapping": ("---\n- a\n---\n", {}, None), "binary": ("\udcff---\n", {}, None), "windows": (HEAD.replace("\n", "\r\n"), {}, "apache-2.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_licence(case, llama4_copy):
    text, config, expected = CASES[case]
    if text is not None:
        (llama4_copy / "README.md").write_bytes(text.encode(errors="surrogateescape"))
    edit_json(llama4_copy / "config.json", **config)
    assert licence(Folder(str(llama4_copy))) == expected


def test_without_a_licence_it_says_so(recipe, tmp_path):
    assert main(["tune", recipe]) == 0
    text, head = export(tmp_path / "run", tmp_path / "out")
    assert "license" not in head and "the base model's folder names none" in text


def test_of_adapters(llama4, sentiment, tmp_path):
    keys = {"method": "quzo-lora", "lora_rank": 2, "noise_bits": 8, "eps": 1, "lr": 0.01}
    assert main(["tune", write_recipe(tmp_path / "recipe.yaml", llama4, sentiment, **keys)]) == 0
    text, head = export(tmp_path / "run", tmp_path / "out")
    assert head["library_name"] == "peft" and head["tags"] == ["qzo", "peft"] and "PeftModel.from_pretrained(base_model, FOLDER)" in text


def test_push(hub, run, tmp_path, capsys):  # noqa: F811
    assert main(["export", str(run), "-o", str(tmp_path / "out"), "--push", "me/tuned"]) == 0
    assert f"pushed: {hub.url}/me/tuned" in capsys.readouterr().out
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} and "model.safetensors" in hub.files
    head = yaml.safe_load(hub.files["README.md"].decode().split("---\n")[1])
    assert head["license"] == "apache-2.0" and b"from_pretrained('me/tuned')" in hub.files["README.md"] and b"# tuned\n" in hub.files["README.md"]
    assert sum("/commit/" in asked for asked in hub.asked) == 1


def failed(run, out, capsys, repo="me/tuned"):
    code = main(["export", str(run), "-o", str(out), "--push", repo])
    return code, capsys.readouterr().err


def test_not_logged_in(hub, run, tmp_path, monkeypatch, capsys):  # noqa: F811
    for token, said in ((None, "no login"), ("hf_another", "a login that the hub does not accept (401)")):
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
        code, err = failed(run, tmp_path / "out", capsys)
        assert code == 2 and said in err and "hf auth login" in err and not (tmp_path / "out").exists()
    assert "/api/repos/create" not in "".join(hub.asked)


def test_a_name_that_is_none(hub, run, tmp_path, capsys):  # noqa: F811
    for repo in ("a/b/c", "me/a b", "me/--x"):
        code, err = failed(run, tmp_path / "out", capsys, repo)
        assert code == 2 and "a hub id like org/name" in err and not (tmp_path / "out").exists()


def test_no_rights(hub, run, tmp_path, capsys):  # noqa: F811
    hub.others.append("/api/models/others/there")
    for repo, out in (("others/absent", tmp_path / "a"), ("others/there", tmp_path / "b")):
        code, err = failed(run, out, capsys, repo)
        assert code == 2 and "no right to write there (403)" in err and f"hf upload {repo} {out}" in err
        assert (out / "config.json").exists() and not hub.files


def test_the_hub_fails(hub, run, tmp_path, capsys):  # noqa: F811
    hub.status = 413
    code, err = failed(run, tmp_path / "out", capsys)
    assert code == 1 and "the hub answers 413" in err and f"hf upload me/tuned {tmp_path}/out" in err and "Traceback" not in err


def test_no_network(hub, run, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, err = failed(run, tmp_path / "out", capsys)
    assert code == 1 and "the hub cannot be reached" in err and not (tmp_path / "out").exists() and TOKEN not in err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, err = failed(run, tmp_path / "out", capsys)
    assert code == 1 and "HF_HUB_OFFLINE is set" in err
