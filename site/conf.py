"""How Sphinx makes the course's site: `make site`.

Pages are the files of the repository where they lie, so that a link between two of them leads to the same place on
GitHub and on the site. Nothing is executed: notebooks show their stored outputs.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from helpers import __version__  # noqa: E402

project = "Backdoor lab"
author = "the authors of the lab"
copyright = "the authors of the lab, Apache-2.0"
version = release = __version__
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "folding",
    "recorded",
    "rooms",
]
root_doc = "site/index"
include_patterns = [
    "site/*.md",
    "site/api/*.rst",
    "notebooks/*.ipynb",
    "course/*.md",
    "course/sheets/*.ipynb",
    "course/solutions/*.ipynb",
    "docs/*.md",
    "benchmarks/README.md",
]
exclude_patterns = [".*", "runs", "site/_build", "**/.ipynb_checkpoints"]

nb_execution_mode = "off"
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

default_role = "code"  # a docstring's `name` is code, as in Markdown
toc_object_entries = False  # thousands of functions in every page's navigation
autodoc_mock_imports = ["lm_eval"]  # the benchmarks' harness is installed where it is wanted; see `make harness`
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Differs from the paper"]
napoleon_use_rtype = False

html_theme = "sphinx_book_theme"
html_title = "Backdoor lab"
mathjax_files = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static"  # formulas need no network
mathjax_path = "mathjax/tex-chtml.js"
html_static_path = ["static", str(mathjax_files)]
html_css_files = ["site.css"]
html_extra_path = ["redirect"]  # index.html at the top leads to site/index.html
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = False  # it is fetched page by page, which a browser refuses for files on a disk
html_context = {"default_mode": "auto"}  # light or dark as the reader's system is
html_theme_options = {
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
