"""The Python code of the README and of the guides."""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FENCE = re.compile(r"^```python[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page):
    """Code and line number of every Python block; the blocks of a page follow one another."""
    text = page.read_text()
    return [(m.group(1), text.count("\n", 0, m.start(1))) for m in FENCE.finditer(text)]


def definitions(page):
    """The imports, classes and functions of a page, without what it does with them."""
    kinds = ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef
    names = {"__name__": page.stem}
    for code, line in blocks(page):
        body = [node for node in ast.parse(code).body if isinstance(node, kinds)]
        tree = ast.increment_lineno(ast.Module(body, []), line)
        exec(compile(tree, str(page), "exec"), names)
    return names
