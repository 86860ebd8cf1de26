"""The report of a run: charts, and a page that stands alone. In a real browser too (campaign)."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from html.parser import HTMLParser

import pytest
from tiny_runs import write_recipe

from qzo.charts import Series, bar_chart, line_chart, moving_mean, thin, ticks
from qzo.checkpoint import newest_snapshot
from qzo.cli import main

VOID = {"meta", "line", "circle", "rect", "polyline", "br", "hr", "img", "input", "link"}
EVIL = "</style></pre><script>alert(1)</script><img src=https://x.invalid/y onerror=alert(2)>\"'&amp;"


class Strict(HTMLParser):
    """Every tag that is opened is closed, in order; collects what there is."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)) and all(value is not None for _, value in attributes), (tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID, tag
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)


def stands_alone(text):
    found = Strict(text)
    assert not {"script", "link", "iframe", "object", "base", "form", "img"} & set(found.tags)
    assert not {"src", "href", "srcset", "style", "action"} & {name for name, _ in found.attributes}
    assert not any(name.startswith("on") for name, _ in found.attributes)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style and "default-src 'none'" in text
    return found


@pytest.fixture(scope="session")
def evil_run(llama4, sentiment, tmp_path_factory):
    """A finished run whose names and texts are made to break a page."""
    base = tmp_path_factory.mktemp("evil")
    recipe = write_recipe(
        base / "<i>&'recipe.yaml", llama4, sentiment, output_dir=json.dumps(str(base / "a <b> & 'c'")), clip_median=2, steps=14, eval_every=5,
        prompt=json.dumps("{sentence} It was" + EVIL),
    )  # fmt: skip
    assert main(["tune", recipe]) == 0
    return base / "a <b> & 'c'"


def test_the_page_of_a_run(evil_run):
    text = (evil_run / "report.html").read_text("utf-8")
    found = stands_alone(text)
    assert found.tags.count("svg") == 5 and len(text) < 100_000
    shown = "\n".join(found.texts)
    assert "{sentence} It was" + EVIL in shown and "<i>&'recipe, seed 0" in shown
    assert f"qzo export '{evil_run}' -o MODEL".replace("'c'", "'\"'\"'c'\"'\"'") in shown
    assert newest_snapshot(evil_run)[2]["state_sha256"] in shown
    for name in ("steps", "skipped", "clipped", "SHA-256 of the tuned state", "versions", "batch_size", "estimate, MB", "snapshot", "together"):
        assert name in found.texts, name
    assert "mean" not in shown.split("Curves")[1].split("Validation")[0]  # of so few steps
    assert shown.index("Loss") < shown.index("Validation accuracy") < shown.index("Projected gradient") < shown.index("Learning rate")


def test_a_run_without_a_finite_loss(llama4, sentiment, tmp_path, monkeypatch):
    """Nothing of a page needs a number to be there."""
    from qzo.report import write_report
    from qzo.run import RunFolder, read_run

    assert main(["tune", write_recipe(tmp_path / "r.yaml", llama4, sentiment, steps=1)]) == 0
    run = RunFolder(tmp_path / "run")
    step = {"step": 0, "loss": None, "abs_d": None, "lr": 0.0, "clipped": False, "skipped": True, "examples": 1, "tokens": 1, "forwards": 1,
            "seconds": 0.0, "peak_memory": 0}  # fmt: skip
    for lines in ([], [step], [step, {"after": 1, "evaluation": {"loss": None, "f1": None}, "peak_memory": 0}]):
        run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_report(run, read_run(str(run.path))[0], "qzo tune", "0" * 64, {"load": {"codes": 0}})
        found = stands_alone((run.path / "report.html").read_text("utf-8"))
        assert "nothing was recorded" in found.texts and "unknown → unknown" in found.texts


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.31, 0.82, [0.2, 0.4, 0.6, 0.8, 1.0]), (0, 299, [0, 100, 200, 300]), (5, 5, [5, 6]), (-3e-5, 0, [-3e-5, -2e-5, -1e-5, 0])],
)  # fmt: skip
def test_ticks_are_round_and_hold_the_data(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_thinning_keeps_spikes():
    points = [(i, 0.0) for i in range(20_000)]
    points[7777], points[12345] = (7777, 9.0), (12345, -9.0)
    kept = thin(points)
    assert len(kept) <= 700 and {points[7777], points[12345]} <= set(kept)
    assert all(a[0] < b[0] for a, b in zip(kept, kept[1:], strict=False))
    assert thin(points[:700]) == points[:700]


def test_moving_mean():
    assert moving_mean([(0, 1.0), (1, 3.0), (2, 8.0)], 2) == [(1, 2.0), (2, 5.5)]


def test_a_chart_draws_where_its_axes_say():
    drawn = line_chart("t", "x", "y", [Series("s", "main", [(0, 0.0), (5, 50.0), (10, 100.0)])], bounds=(0, 100))
    points = re.search('points="([^"]*)"', drawn)[1].split()
    assert points == ["58.0,228.0", "263.0,119.0", "468.0,10.0"]
    assert re.search('<text class="end" x="52" y="15.0">100</text>', drawn)
    by_log = line_chart("t", "x", "y", [Series("s", "main", [(0, 0.0), (5, 1.0), (10, 100.0)])], log=True)
    assert re.search('points="([^"]*)"', by_log)[1].split() == ["58.0,228.0", "468.0,10.0"]


def test_charts_escape_and_stand_nothing():
    for drawn in (line_chart(EVIL, EVIL, EVIL, [Series(EVIL, "main", [(0, 1.0)])]), line_chart(EVIL, "", "", []), bar_chart(EVIL, [(EVIL, 0, EVIL)], (0, EVIL))):
        assert "script" not in Strict(drawn).tags


HARNESS = """<!DOCTYPE html><body><iframe id="f" style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe><pre id="o"></pre><script>
f.onload = () => {{
  const d = f.contentDocument, box = e => e.getBoundingClientRect(), all = s => [...d.querySelectorAll(s)];
  o.textContent = JSON.stringify({{
    wide: d.documentElement.scrollWidth, heights: all("svg").map(s => box(s).height), ran: d.scripts.length, images: d.images.length,
    font: Math.min(...all("svg").map(s => 14 * box(s).width / 480)), page: getComputedStyle(d.body).backgroundColor,
    outside: all("svg text").filter(t => {{ const a = box(t), b = box(t.closest("svg"));
      return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1; }}).map(t => t.textContent),
  }});
}};
</script></body>"""


@pytest.mark.campaign
@pytest.mark.parametrize("width", [360, 1100])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_a_browser(width, dark, evil_run, tmp_path):
    """Nothing leaves its place or the page, nothing is fetched or run, and the text of a chart can be read."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs chromium (apt-get install chromium)")
    text = (evil_run / "report.html").read_text("utf-8")
    (tmp_path / "harness.html").write_text(HARNESS.format(width=width, page=escape(text)))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path}/profile",
         "--enable-logging=stderr", f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", f"file://{tmp_path}/harness.html"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(unescape(re.search('<pre id="o">(.*?)</pre>', done.stdout)[1]))
    assert found["wide"] <= width and found["outside"] == [] and found["ran"] == found["images"] == 0
    assert len(found["heights"]) == 5 and min(found["heights"]) > 50 and found["font"] >= 9
    assert found["page"] == ("rgb(18, 21, 26)" if dark else "rgb(246, 247, 249)")
