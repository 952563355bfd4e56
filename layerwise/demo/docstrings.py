"""The text of the embedded study: the docstrings of the pinned scientific packages.

Read with `ast` from the installed packages, which are never imported. One document per module; a module belongs
whole to train, validation or test. With the versions of requirements.lock the text is the same on every machine, and
resources/demo/text.sha256 holds it to that, package by package.
"""

import argparse
import ast
import hashlib
import importlib.metadata
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from layerwise.runtime.errors import InputError, report_errors
from layerwise.runtime.files import write_atomic
from layerwise.runtime.project import ROOT

PACKAGES = {  # distribution -> import package
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "numpy": "numpy",
    "pandas": "pandas",
    "scikit-learn": "sklearn",
    "scipy": "scipy",
    "sympy": "sympy",
}
SPLITS = ("train", "validation", "test")
HELD_OUT_PERCENT = 4  # of the modules, for validation and for test each
# Written when a wheel is built, so they differ between platforms.
GENERATED = {"__config__.py", "version.py", "_version.py", "_distributor_init.py", "_distributor_init_local.py"}
Modules = dict[str, list[tuple[str, str]]]  # module -> its (qualified name, docstring) pairs
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def package_folder(distribution: str) -> Path:
    """Folder of an installed package, found from its metadata without importing it."""
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            f"The embedded study reads the docstrings of {distribution}, which is not installed: "
            f"`pip install {pinned([distribution])}` installs it."
        ) from None
    return Path(str(found.locate_file(PACKAGES[distribution])))


def pinned(distributions: Iterable[str]) -> str:
    """These distributions with the versions of requirements.lock, as pip takes them."""
    lines = (ROOT / "requirements.lock").read_text("utf-8").splitlines()
    versions = dict(line.split("==") for line in lines if "==" in line)
    return " ".join(f"{name}=={versions[name]}" for name in distributions)


def docstrings(source: str) -> list[tuple[str, str]]:
    """(qualified name, cleaned docstring) of a module's source, in order of appearance."""
    found = []

    def visit(node: ast.AST, name: str) -> None:
        text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        if text:
            found.append((name, text))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                visit(child, f"{name}.{child.name}".lstrip("."))
            elif isinstance(child, (ast.If, ast.Try)):
                visit(child, name)

    with warnings.catch_warnings():  # a docstring's invalid escapes are its author's affair
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    visit(tree, "")
    return found


def package_docstrings(distribution: str) -> Modules:
    """Module -> its (qualified name, docstring) pairs, for the modules of a package that have any (tests left out)."""
    folder = package_folder(distribution)
    documents = {}
    for path in sorted(folder.rglob("*.py"), key=lambda p: p.relative_to(folder).as_posix()):
        parts = path.relative_to(folder).with_suffix("").parts
        if "tests" in parts or path.name in GENERATED:
            continue
        module = ".".join((PACKAGES[distribution], *parts)).removesuffix(".__init__")
        found = docstrings(path.read_text("utf-8"))
        if found:
            documents[module] = [(f"{module}.{name}".rstrip("."), text) for name, text in found]
    return documents


def split_of(module: str) -> str:
    """The split of a module, from a hash of its name: a new module moves no other."""
    percent = int.from_bytes(hashlib.sha256(module.encode()).digest()[:4], "big") % 100
    if percent < HELD_OUT_PERCENT:
        return "test"
    return "validation" if percent < 2 * HELD_OUT_PERCENT else "train"


def without_repeats(documents: Modules) -> Modules:
    """Keep each docstring once, in train where train has it: no held-out docstring was trained on word for word."""
    seen: set[str] = set()
    kept = {}
    for module in sorted(documents, key=lambda m: (SPLITS.index(split_of(m)), m)):
        kept[module] = [(name, text) for name, text in documents[module] if text not in seen]
        seen.update(text for _, text in kept[module])
    return {module: pairs for module, pairs in kept.items() if pairs}


def render(documents: Modules) -> str:
    """One text: a docstring under its qualified name, two empty lines between docstrings, three between modules."""
    return "\n\n\n\n".join("\n\n\n".join(f"{n}\n{t}" for n, t in pairs) for pairs in documents.values())


def digest(documents: Modules) -> str:
    return hashlib.sha256(render(documents).encode("utf-8")).hexdigest()


def check(by_package: dict[str, Modules], expected: dict[str, str]) -> None:
    """Raise InputError, naming the packages whose text is not the recorded one."""
    wrong = [name for name, documents in by_package.items() if digest(documents) != expected.get(name)]
    if wrong:
        installed = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in wrong)
        raise InputError(
            f"The docstrings of {installed} are not those that the demo model was trained on: "
            f"`pip install {pinned(wrong)}` installs those."
        )


def read_hashes(path: Path) -> dict[str, str]:
    lines = (line.split() for line in path.read_text("utf-8").splitlines())
    return {name: digest for digest, name in lines}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hashes", type=Path, required=True, help="recorded SHA-256 per package")
    parser.add_argument("--record", action="store_true", help="write the hashes instead of checking them")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.txt, validation.txt and test.txt")
    args = parser.parse_args(argv)

    by_package = {name: package_docstrings(name) for name in PACKAGES}
    if args.record:
        write_atomic(args.hashes, "".join(f"{digest(docs)}  {name}\n" for name, docs in by_package.items()))
    else:
        check(by_package, read_hashes(args.hashes))
    documents = without_repeats({m: pairs for modules in by_package.values() for m, pairs in modules.items()})
    for split in SPLITS:
        chosen = {module: pairs for module, pairs in documents.items() if split_of(module) == split}
        write_atomic(args.out / f"{split}.txt", render(chosen))


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
