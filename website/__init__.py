"""The documentation site: the repository's own pages, and pages that are generated from the code.

`python -m website FOLDER` writes the pages and a mkdocs.yml into a folder, which `make site` builds with MkDocs.
"""
