"""Pages with numbers are what their scripts make of the raw results; the README is short."""

import importlib.util
import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch):
    """Scripts import each other from their own folder."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_what_their_scripts_make():
    made = script("make_results")
    written = {path.stem: path.read_text() for path in made.FOLDER.glob("*.md")}
    assert written == {name: made.text(name) for name in made.PAGES}, "run make_results.py"
    speed = script("make_speed")
    assert speed.PAGE.read_text() == speed.page(), "run python benchmarks/make_speed.py"


def test_the_figures_of_the_page_can_be_drawn_from_the_results(tmp_path):
    module = script("make_figures")
    module.main(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert {"sparsity.png", "time.png"} <= drawn
    assert drawn <= {path.name for path in module.FIGURES.iterdir()}


def test_the_table_of_the_readme_is_made_from_the_results():
    module = script("make_results")
    assert module.readme() == README, "run python benchmarks/make_results.py"
    assert module.index.facts()["readme_table"] in README


def test_the_speed_of_the_readme_is_that_of_the_timings():
    least, most = script("make_speed").speedups()
    assert f"{least} to {most} times as fast" in README


def test_other_results_give_another_page_or_are_refused(tmp_path, monkeypatch):
    """The page follows the data, and a sentence that they contradict stops the script."""
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    module = script("make_results")
    monkeypatch.setattr(importlib.import_module("pages.results.raw"), "RAW", tmp_path)
    page = lambda: module.text("same-share")
    assert page() == (module.FOLDER / "same-share.md").read_text()
    path = tmp_path / "fashion_mnist_lenet300100.json"
    results = json.loads(path.read_text())
    for result in results:
        if result["method"] == "dense":
            result["test_accuracy"] = 0.5
    path.write_text(json.dumps(results))
    assert "| 50.00 ± 0.00 | 50.00, 50.00, 50.00 |" in page()
    for result in results:
        if result["method"] == "ntt":
            result["test_accuracy"] = 0.8
    path.write_text(json.dumps(results))
    with pytest.raises(SystemExit, match="no longer say: A random mask"):
        page()


def test_the_readme_is_short():
    assert len(README.split()) <= 500
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    assert README.count("![") == 1


def test_what_the_search_calls_ahead():
    """Two standard errors over common seeds, of which there are five."""
    lead = script("search").lead
    noise = [0.3, -0.2, 0.1, -0.1, 0.0]
    other = {seed: 84.0 for seed in range(6)}
    far = {seed: 84.5 + gap for seed, gap in enumerate(noise)}
    near = {seed: 84.1 + gap for seed, gap in enumerate(noise)}
    assert lead(far, other)["ahead"] and not lead(near, other)["ahead"]
    assert lead(far, other)["mean"] == pytest.approx(0.52)
    assert not lead(dict(list(far.items())[:4]), other)["ahead"]
    assert not lead({7: 99.0}, other)["ahead"]
