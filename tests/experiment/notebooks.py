"""Run the code cells of a notebook in plain Python, and keep what they print and draw.

`python -m tests.experiment.notebooks examples/*.ipynb` runs notebooks and writes their outputs into
them. Jupyter is not needed for that; the files are ordinary notebooks.
"""

import base64
import contextlib
import io
import json
import sys
from pathlib import Path


def read(path):
    """The notebook at `path`, as nested dictionaries."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def run(notebook, parameters=None):
    """Execute all code cells in one namespace and return it; the outputs go into `notebook`.

    **Arguments:**

    - `notebook`: from `read`.
    - `parameters`: values that replace those of the cell with the tag `parameters`.
    """
    namespace = {"__name__": "__main__"}
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        count += 1
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"<cell {count}>", "exec"), namespace)
        if "parameters" in cell["metadata"].get("tags", ()):
            namespace.update(parameters or {})
        cell["execution_count"] = count
        cell["outputs"] = [*_text(printed.getvalue()), *_figures()]
    return namespace


def write(path, notebook):
    """Put `notebook` at `path`."""
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    Path(path).write_text(text, encoding="utf-8")


def _text(printed):
    if not printed:
        return []
    lines = printed.splitlines(keepends=True)
    return [{"name": "stdout", "output_type": "stream", "text": lines}]


def _figures():
    import matplotlib.pyplot as plt

    found = []
    for number in plt.get_fignums():
        buffer = io.BytesIO()
        plt.figure(number).savefig(buffer, format="png", dpi=90, metadata={"Software": None})
        picture = base64.b64encode(buffer.getvalue()).decode()
        found.append(
            {
                "data": {"image/png": picture, "text/plain": ["<Figure>"]},
                "metadata": {},
                "output_type": "display_data",
            }
        )
    plt.close("all")
    return found


if __name__ == "__main__":
    import matplotlib

    matplotlib.use("Agg")
    for name in sys.argv[1:]:
        opened = read(name)
        run(opened)
        write(name, opened)
