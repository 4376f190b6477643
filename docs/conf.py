"""sphinx-build -W docs docs/_build"""

import re
from typing import Any

project = "flipguard-onnx"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "attacks.md"]  # which rows.md includes
default_role = "code"

html_theme = "furo"
html_title = project
html_extra_path = ["../flipguard_onnx/report.schema.json"]
html_copy_source = False

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_class_signature = "separated"
autodoc_member_order = "bysource"
autodoc_default_options = {
    "members": True,
    "show-inheritance": True,
    "exclude-members": "__init__, __new__",
}


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", describe, priority=400)  # before napoleon


def describe(*arguments: Any) -> None:
    """`name : text`, our form for parameters, results and errors, as name and description.

    Napoleon would take the text for a type.
    """
    lines = arguments[-1]
    for index, line in reversed([*enumerate(lines)]):
        if found := re.fullmatch(r"([\w*]+(?:, [\w*]+)*) : (.+)", line):
            lines[index : index + 1] = [found[1], f"    {found[2]}"]
