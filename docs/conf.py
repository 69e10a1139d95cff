"""Settings of the site: sphinx-build -W docs build/site."""

from __future__ import annotations

project = "bn"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
nitpicky = True
html_theme = "furo"
html_title = "bn"
html_static_path: list[str] = []
html_copy_source = False
html_show_sphinx = False
myst_heading_anchors = 4
myst_links_external_new_tab = False
