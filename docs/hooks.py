"""Fill in the reference pages: every name that a room re-exports, in the order of its API list."""

import ast
import pathlib
import re

_MARK = re.compile(r"^@all (\S+) from (\S+)$", re.MULTILINE)
_ROOT = pathlib.Path(__file__).parents[1]


def on_page_markdown(markdown, page, config, files):
    """Replace `@all MODULE from FILE` by `::: MODULE.NAME` for each public name in FILE.

    Names that the page lists itself are left out.
    """
    del page, config, files

    def entries(mark):
        module, path = mark.groups()
        listed = set(re.findall(rf"(?m)^::: {re.escape(module)}\.(\w+)$", markdown))
        names = [name for name in exported(_ROOT / path) if name not in listed]
        return "\n\n".join(f"::: {module}.{name}" for name in names)

    return _MARK.sub(entries, markdown)


def exported(path):
    """Names that an `__init__.py` re-exports as `from ._x import name as name`; no modules."""
    tree = ast.parse(path.read_text())
    return [
        alias.asname
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
        if alias.asname == alias.name and not alias.name.startswith("_")
    ]
