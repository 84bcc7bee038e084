"""What the site adds to docs/: two doors of the README and the notebooks as pages, and the figures
of results/.

A link to a file outside docs/ that is no figure becomes its text: the site has no sources.
"""

import json
import re
from pathlib import Path, PurePosixPath

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
DOORS = {"layers.md": "Use a layer", "train.md": "Train a Hope"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#:]+)\)")


def door(name: str) -> str:
    """The README from a door's bold beginning to the next one's, as a page."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    begin = text.index(f"**{DOORS[name]}")
    own = text[begin : text.find("\n**", begin)].replace("](docs/", "](")
    return f"# {DOORS[name]}\n\n{own}\n"


def notebook(path: Path) -> str:
    """A notebook with what it printed, as a page: title, text, code, outputs of text."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        said = "".join("".join(output["text"]) for output in cell["outputs"])
        parts += [f"```text\n{said}```"] if said else []
    title, *rest = parts[0].split("\n", 1)
    own = f"*This page is [a notebook]({path.name}), run as it stands.*"
    return "\n\n".join([title, own, *rest, *parts[1:], ""])


def on_files(files, config):
    for name in DOORS:
        files.append(File.generated(config, name, content=door(name)))
    for path in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        name = f"notebooks/{path.stem}.md"
        files.append(File.generated(config, name, content=notebook(path)))
    for page in (ROOT / "docs").rglob("*.md"):
        for _, _, target in LINK.findall(page.read_text(encoding="utf-8")):
            path = (page.parent / target).resolve()
            if path.suffix == ".png" and path.is_file() and not _inside(path):
                uri = _uri(path)
                if files.get_file_from_path(uri) is None:
                    files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    here = PurePosixPath(page.file.src_uri).parent

    def inside(match):
        mark, text, target = match.groups()
        path = (ROOT / "docs" / here / target).resolve()
        if _inside(path):
            return match[0]
        up = "../" * len(here.parts)
        return f"{mark}[{text}]({up}{_uri(path)})" if path.suffix == ".png" else text

    return LINK.sub(inside, markdown)


def _inside(path: Path) -> bool:
    return path.is_relative_to(ROOT / "docs")


def _uri(path: Path) -> str:
    return f"figures/{path.relative_to(ROOT).as_posix()}"
