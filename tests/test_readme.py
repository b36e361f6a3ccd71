"""The Python code of the README and of the guides runs, and their commands are those of CI."""

import ast
import importlib.util
import re
import subprocess
import sys

import pytest
from helpers import torch_stand_in
from helpers.pages import PAGES, ROOT, blocks
from helpers.tiers import default_only

WITH_CODE = [page for page in PAGES if blocks(page)]


# The guides take minutes; the two pages that everybody opens first stand for them by default.
@pytest.mark.parametrize(
    "page",
    default_only(WITH_CODE, ROOT / "README.md", ROOT / "docs" / "index.md"),
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page.stem == "from-pytorch":
        pytest.importorskip("torch")  # several GB, so in no extra
    if importlib.util.find_spec("torch") is None:
        monkeypatch.setitem(sys.modules, "torch", torch_stand_in)
    names = {"__name__": "__main__"}
    for code, line in blocks(page):
        exec(compile("\n" * line + code, str(page), "exec"), names)


@pytest.mark.slow
def test_the_program_of_the_readme_is_strictly_typed(tmp_path):
    pytest.importorskip("pyright")
    strict = "# pyright: strict, reportMissingTypeStubs=false\n"  # optax has no stubs
    path = tmp_path / "program.py"
    path.write_text(strict + "".join(code for code, _ in blocks(ROOT / "README.md")))
    words = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, str(path)]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert "0 errors" in found.stdout, found.stdout


OF_ONES_OWN = ["your-own-method", "your-own-data", "training", "sparse-networks",
               "kernel-regression", "your-own-in-compare", "compare-in-python",
               "observers"]  # fmt: skip


@pytest.mark.parametrize("name", OF_ONES_OWN)
def test_what_users_bring_takes_at_most_15_lines(name):
    """Each block, without the imports of a page's first one."""
    for code, line in blocks(ROOT / "docs" / "guides" / f"{name}.md"):
        first = [n for n in ast.parse(code).body if not isinstance(n, ast.Import | ast.ImportFrom)]
        written = code.splitlines()[first[0].lineno - 1 :]
        assert len([text for text in written if text.strip()]) <= 15, line


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
