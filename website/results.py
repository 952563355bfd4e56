"""Result pages: the tables and figures of figures/gallery with the figures' captions, and the accepted numbers."""

from pathlib import Path

from layerwise.runtime.project import ROOT
from website.markdown import table

GALLERY = Path("figures/gallery")
ACCEPTED = Path("results/accepted")
CAPTIONS = ROOT / "workflow/report"
FIRST = ("smollm2-small", "embedded")  # before the others, which are in alphabetical order


def studies() -> list[str]:
    """Names of the studies that the gallery has figures of."""
    found = sorted(path.name for path in (ROOT / GALLERY).iterdir() if path.is_dir())
    return sorted(found, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def address(study: str) -> str:
    """Path of a study's page within the site."""
    return f"results/{study}.md"


def page(study: str) -> str:
    """A study's tables as they were written, then its figures with their captions.

    Links are relative to figures/gallery/STUDY, as in a page that is there.
    """
    folder = ROOT / GALLERY / study
    tables = folder / "main.md"
    up = "../" * (len(GALLERY.parts) + 1)
    lines = [f"# Study {study}\n", f"Written by `make gallery STUDY={study}` from the tables of a run. "]
    accepted = sorted(path.name for path in (ROOT / ACCEPTED / study).glob("*.csv"))
    if accepted:
        named = ", ".join(f"[{name}]({up}{ACCEPTED.as_posix()}/{study}/{name})" for name in accepted)
        lines.append(f"Accepted numbers, which `make regression STUDY={study}` compares a run with: {named}.\n")
    lines += ["\n", *([tables.read_text("utf-8")] if tables.is_file() else [])]
    for figure in sorted(folder.glob("*.png")):
        title = figure.stem.replace("_", " ").capitalize()
        lines.append(f"\n## {title}\n\n![{title}]({figure.name})\n\n{_caption(figure.stem)}\n")
    return "".join(lines)


def _caption(figure: str) -> str:
    """The caption of a figure as the report has it, in HTML; nothing where it has none."""
    path = CAPTIONS / f"{figure}.rst"
    if not path.is_file():
        return ""
    from layerwise.report.page import prose

    return prose(path)


def overview() -> str:
    """A page that leads to every study, with what its config says of it. Links are relative to the repository."""
    rows = [[f"[{name}]({GALLERY.as_posix()}/{name}/main.md)", _about(name)] for name in studies()]
    return "# Results\n\nTables and figures are written by `make gallery`, from the tables of a run.\n\n" + table(
        ["study", "what it is"], rows
    )


def _about(study: str) -> str:
    """The first sentence of a study's config."""
    path = ROOT / "config" / ("config.yaml" if study == "embedded" else f"{study}.yaml")
    lines = path.read_text("utf-8").splitlines()
    said = [line.removeprefix("# ") for line in lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")]]
    return " ".join(said).partition(". ")[0].rstrip(".") + "."
