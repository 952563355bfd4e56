"""A notebook as a page: its text as it stands, its code in blocks, and what the code printed where that was kept.

`python -m website.notebook FILE` runs a notebook and keeps what it prints.
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

from layerwise.runtime.errors import report_errors


def cells(text: str, kind: str) -> list[str]:
    """The sources of a notebook's cells of a kind, `code` or `markdown`, in their order."""
    return ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == kind]


def markdown(text: str) -> str:
    """The page of a notebook, given as the JSON of its file."""
    return "\n".join(part for cell in json.loads(text)["cells"] for part in _cell(cell))


def _cell(cell: dict[str, Any]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return [source + "\n"]
    printed = "".join("".join(output.get("text", "")) for output in cell["outputs"])
    return [f"```python\n{source}\n```\n", *([f"```text\n{printed.rstrip()}\n```\n"] if printed else [])]


def run(text: str, names: dict[str, Any]) -> str:
    """The notebook with what its code prints now; names: in which the code runs, and which it adds to.

    Figures are drawn without a screen, and not kept.
    """
    notebook = json.loads(text)
    for number, cell in enumerate(own for own in notebook["cells"] if own["cell_type"] == "code"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {number + 1}", "exec"), names)
        lines = printed.getvalue().splitlines(keepends=True)
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main(argv: list[str]) -> None:
    """Run notebooks, and keep what they print in their files."""
    import matplotlib

    matplotlib.use("Agg")
    for path in map(Path, argv):
        path.write_text(run(path.read_text("utf-8"), {}), "utf-8")


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
