"""What the wheel and the sdist of a folder hold: the package whole, and nothing that is not meant.

`python .ci/contents.py dist` exits with 1 and says what is wrong.
"""

import re
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOPS = {
    "src", "tests", "docs", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md",
    "CITATION.cff", "LICENSE", "pyproject.toml", "PKG-INFO", ".gitignore",
}  # fmt: skip


def package() -> set[str]:
    """The files of the package, as the wheel names them."""
    files = (ROOT / "src").rglob("*")
    return {
        file.relative_to(ROOT / "src").as_posix()
        for file in files
        if file.is_file() and "__pycache__" not in file.parts and ".egg-info" not in str(file)
    }


def version() -> str:
    """The one that the package says."""
    text = (ROOT / "src/nestlearn/_version.py").read_text(encoding="utf-8")
    return re.search(r'__version__ = "(.+)"', text)[1]  # type: ignore[index]


def check(folder: Path) -> list[str]:
    """What is wrong."""
    name = f"nestlearn-{version()}"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl") as wheel:
        held = {n for n in wheel.namelist() if not n.startswith(f"{name}.dist-info/")}
    wrong = [f"the wheel lacks {n}" for n in sorted(package() - held)]
    wrong += [f"the wheel has {n}" for n in sorted(held - package())]
    with tarfile.open(folder / f"{name}.tar.gz") as sdist:
        names = {n.removeprefix(f"{name}/") for n in sdist.getnames()}
    wrong += [f"the sdist lacks {n}" for n in sorted({f"src/{n}" for n in package()} - names)]
    wrong += [f"the sdist has {n}" for n in sorted(names) if n.split("/")[0] not in TOPS]
    return wrong + [f"the sdist has {n}" for n in names if "__pycache__" in n]


if __name__ == "__main__":
    found = check(Path(sys.argv[1]))
    print(*(found or [f"wheel and sdist of {version()} hold what they should"]), sep="\n")
    sys.exit(bool(found))
