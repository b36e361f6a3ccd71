"""The Python code of the README and of the guides runs, and their commands are those of CI."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FENCE = re.compile(r"^```python[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page):
    """Code and line number of every Python block; the blocks of a page follow one another."""
    text = page.read_text()
    return [(m.group(1), text.count("\n", 0, m.start(1))) for m in FENCE.finditer(text)]


WITH_CODE = [page for page in PAGES if blocks(page)]


@pytest.mark.parametrize("page", WITH_CODE, ids=[str(p.relative_to(ROOT)) for p in WITH_CODE])
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for code, line in blocks(page):
        exec(compile("\n" * line + code, str(page), "exec"), names)


def test_the_readme_has_code():
    assert ROOT / "README.md" in WITH_CODE


def test_the_two_commands_of_the_readme():
    text = (ROOT / "README.md").read_text()
    assert "pip install -e '.[cli]' && ntt-eqx compare\n" in text
    assert "pip install -e '.[cli,test]' && pytest\n" in text
    assert (
        "test_command=\"pip install -e '.[cli,test]' && pytest\""
        in (ROOT / ".ci" / "run").read_text()
    )


@pytest.mark.parametrize("page", PAGES, ids=[str(p.relative_to(ROOT)) for p in PAGES])
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
