"""Every page and file of the site, made of the repository's: which page is where, and links that lead there."""

import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from layerwise.runtime.errors import InputError
from layerwise.runtime.project import ROOT
from website import notebook, reference, results
from website.markdown import relinked, spaced

SETTINGS = ROOT / "website/mkdocs.yml"
# Repository -> site, for pages that are not below docs/.
ELSEWHERE = {
    "config/README.md": "reference/config-guide.md",
    "resources/demo/README.md": "results/demo-model.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
# Source of a generated page -> that page. A link leads to the source on the code host, and to the page on the site.
GENERATED = {
    "README.md": "index.md",
    "layerwise/__init__.py": "reference/api.md",
    "layerwise/cli/app.py": "reference/cli.md",
    "workflow/schemas/config.schema.yaml": "reference/config.md",
    "workflow/schemas/tables.schema.yaml": "reference/tables.md",
    "workflow/rules": "reference/rules.md",
    "methods": "reference/methods.md",
    "allocators": "reference/allocators.md",
    "figures/gallery": "results/index.md",
}
FILES = "files"  # folder of the site with what else of the repository is linked to or shown


def sources() -> dict[str, str]:
    """Path within the repository -> path within the site, of every page that is written by hand."""
    found = {f"docs/{name}": name for name in (path.relative_to(ROOT / "docs").as_posix() for path in _written())}
    return {
        **{path: name.removesuffix(".ipynb").removesuffix(".md") + ".md" for path, name in found.items()},
        **ELSEWHERE,
    }


def _written() -> Iterator[Path]:
    for pattern in ("*.md", "*.ipynb"):
        yield from sorted((ROOT / "docs").rglob(pattern))


def addresses() -> dict[str, str]:
    """Path within the repository -> page of the site that a link to it leads to."""
    studies = {f"{results.GALLERY.as_posix()}/{name}/main.md": results.address(name) for name in results.studies()}
    return {**sources(), **GENERATED, **studies}


class Site:
    """The pages of the site as text, and the files of the repository that they show or link to."""

    def __init__(self) -> None:
        self.addresses = addresses()
        self.pages: dict[str, str] = {}
        self.files: dict[str, Path] = {}  # path within the site -> file
        for source, page in sources().items():
            text = (ROOT / source).read_text("utf-8")
            self._add(page, source, notebook.markdown(text) if source.endswith(".ipynb") else text)
        for study in results.studies():
            self._add(results.address(study), f"{results.GALLERY.as_posix()}/{study}/main.md", results.page(study))
        self._add("results/index.md", "README.md", results.overview())
        self.pages |= {page: written() for page, written in reference.PAGES.items()}

    def _add(self, page: str, source: str, text: str) -> None:
        """Take a page whose links are relative to a path of the repository."""

        def address(target: str) -> str:
            return posixpath.relpath(self._place(target, source), posixpath.dirname(page) or ".")

        self.pages[page] = spaced(relinked(text, source, address))

    def _place(self, target: str, source: str) -> str:
        """Where a path of the repository lies in the site. Raises InputError for one that is not there."""
        if target in self.addresses:
            return self.addresses[target]
        file = ROOT / target
        if target.startswith("..") or not file.is_file():
            raise InputError(f"A link of {source} must lead to a page or a file. Got {target!r} instead.")
        self.files[f"{FILES}/{target}"] = file
        return f"{FILES}/{target}"

    def settings(self, pages: str, html: str) -> dict[str, Any]:
        """The settings of MkDocs, with the studies' pages in the navigation; pages, html: its two folders."""
        own = yaml.safe_load(SETTINGS.read_text("utf-8"))
        section = next(item["Results"] for item in own["nav"] if "Results" in item)
        section[1:1] = [{name: results.address(name)} for name in results.studies()]
        return {**own, "docs_dir": pages, "site_dir": html}


def write(folder: Path) -> Path:
    """Write the pages, files and settings into a folder, and give the settings' file; html/ is where MkDocs writes.

    Raises InputError for a link that leads nowhere.
    """
    site = Site()
    for name, text in site.pages.items():
        path = folder / "pages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    for name, file in site.files.items():
        path = folder / "pages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.read_bytes())
    settings = folder / "mkdocs.yml"
    settings.write_text(yaml.safe_dump(site.settings("pages", "html"), sort_keys=False), "utf-8")
    return settings
