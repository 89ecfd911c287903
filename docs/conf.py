"""Configuration of the documentation; see https://www.sphinx-doc.org/en/master/usage/configuration.html."""

from __future__ import annotations

import os
import shutil
from datetime import date
from importlib.metadata import metadata
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent


def copy_tutorials() -> None:
    """Put the notebooks of ``tutorials/`` where Sphinx can see them, so that they have one source."""
    target = HERE / "tutorials"
    target.mkdir(exist_ok=True)
    for stale in target.glob("*.ipynb"):
        stale.unlink()
    for notebook in sorted((ROOT / "tutorials").glob("*.ipynb")):
        shutil.copy2(notebook, target)


def pinned_versions() -> dict[str, str]:
    """Versions in ``constraints.txt``, for ``{{ torch }}`` in the text."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.replace("-", "_"): number for name, number in pins}


copy_tutorials()

# -- project ---------------------------------------------------------------------------------------------------------

info = metadata("scfm")
urls = dict(line.split(", ", 1) for line in info.get_all("Project-URL"))
project = info["Name"]
author = info["Author"]
copyright = f"{date.today():%Y}, {author}"
version = release = info["Version"]
html_baseurl = urls["Documentation"] + "/"

# -- what is read ----------------------------------------------------------------------------------------------------

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_autodoc_typehints",
    "scanpydoc.elegant_typehints",
    "sphinx_copybutton",
    "sphinx_design",
]
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}  # autosummary takes the first
exclude_patterns = ["_build", "_templates", "**.ipynb_checkpoints"]
templates_path = ["_templates"]
needs_sphinx = "8.1"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "substitution"]
myst_heading_anchors = 4
myst_substitutions = pinned_versions()
nb_execution_mode = "off"
nb_merge_streams = True

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # sphinx_autodoc_typehints writes them
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_include_init_with_doc = False
napoleon_use_ivar = True
napoleon_use_rtype = True
always_document_param_types = False
typehints_defaults = "braces"
typehints_use_rtype = False

# -- links -----------------------------------------------------------------------------------------------------------

# Other projects' inventories need a network; the documentation has to build without one.
online = any(os.environ.get(name) for name in ("READTHEDOCS", "SCFM_DOCS_INTERSPHINX"))
intersphinx_mapping = {}
if online:
    intersphinx_mapping = {
        "anndata": ("https://anndata.readthedocs.io/en/stable/", None),
        "mudata": ("https://mudata.readthedocs.io/stable/", None),
        "numpy": ("https://numpy.org/doc/stable/", None),
        "pandas": ("https://pandas.pydata.org/pandas-docs/stable/", None),
        "python": ("https://docs.python.org/3", None),
        "scanpy": ("https://scanpy.readthedocs.io/en/stable/", None),
        "scipy": ("https://docs.scipy.org/doc/scipy/", None),
        "torch": ("https://docs.pytorch.org/docs/stable/", None),
    }
# every link to a name of scfm has to resolve; those to other projects do where their inventories are loaded
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!scfm\.).*"),
    (r"py:.*", r"scfm\.(.*\.)?_.*"),  # classes that are returned but not exported
]

# -- how it looks ----------------------------------------------------------------------------------------------------

html_theme = "sphinx_book_theme"
html_title = "scfm"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_sourcelink = False
html_theme_options = {
    "path_to_docs": "docs",
    "repository_branch": "main",
    "repository_url": urls["Source"],
    "show_navbar_depth": 1,
    "use_issues_button": True,
    "use_repository_button": True,
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
pygments_style = "default"
