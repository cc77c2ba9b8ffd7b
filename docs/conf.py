"""Sphinx: the pages beside this file, in MyST Markdown. Build: nox -s docs."""

project = "procession"
author = "The procession developers"
project_copyright = author

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "requirements.txt"]
html_theme = "furo"
html_title = "procession"
myst_heading_anchors = 3
