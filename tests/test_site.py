"""The site builds without a warning and asks no host; the release's version stands in one place."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nestlearn
from commands import PAGES
from notebooks import NOTEBOOKS

ROOT = Path(__file__).parents[1]


def test_the_site_builds(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    start = (tmp_path / "site/index.html").read_text()
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//', start)
    for page, said in {
        "layers": "SelfModifyingTitans",
        "train": "from_pretrained",
        "reference": "ContinuumMemory",
        "results/equal-time": "figures/results/equal-time",
        "notebooks/layer": "goes on with another ring",  # printed
    }.items():
        assert said in (tmp_path / "site" / page / "index.html").read_text(), page


def test_every_page_is_in_the_nav():
    nav = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    pages |= {"layers.md", "train.md"}  # these two are the README's
    assert set(nav) == pages | {f"notebooks/{path.stem}.md" for path in NOTEBOOKS}


def test_the_code_of_every_page_is_run_by_a_test():
    """A page with Python that is new here needs one."""
    pages = {p for p in PAGES if "```python" in p.read_text()}
    assert {page.name for page in pages} == {
        "README.md", "huggingface.md", "index.md",  # test_readme.py
        "optimizers.md", "stacking.md", "serve.md",  # those of optim, hf and serve
    }  # fmt: skip


def test_the_version_is_said_alike():
    assert f"version: {nestlearn.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {nestlearn.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()


def test_wheel_and_sdist_hold_the_package_and_nothing_else(tmp_path):
    for kind in ("wheel", "sdist"):
        build = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", tmp_path]
        subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    contents = [sys.executable, ROOT / ".ci/contents.py", tmp_path]
    done = subprocess.run(contents, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
