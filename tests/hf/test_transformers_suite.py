"""transformers' own common tests pass on HopeForCausalLM.

They are in its sdist, which is not part of the project: unpack it and give its folder.

    pip download --no-deps --no-binary :all: transformers==$(python -c \
        "import transformers; print(transformers.__version__)")
    pytest tests/hf/test_transformers_suite.py --transformers transformers-5.24.0
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# What the tests import from files that the sdist leaves out.
ABSENT = {
    "generation/test_utils.py": "class GenerationTesterMixin: pass\n",
    "exporters/test_export.py": "class ExportTesterMixin: pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {'return_dict': False}\n",
    "utils/tiny_model_summary.json": "{}\n",
}


def test_the_common_tests_pass(request, tmp_path):
    sdist = request.config.getoption("--transformers")
    if sdist is None or not (sdist / "tests" / "test_modeling_common.py").is_file():
        pytest.skip("no transformers sdist with tests/: give its folder with --transformers")
    (tmp_path / "src").symlink_to(sdist.resolve() / "src")
    tests = tmp_path / "tests"
    shutil.copytree(sdist / "tests", tests)
    ours = Path(__file__).with_name("common_suite.py").read_text()
    for name, text in {**ABSENT, "models/hope/test_modeling_hope.py": ours}.items():
        if not (tests / name).exists():
            (tests / name).parent.mkdir(parents=True, exist_ok=True)
            (tests / name).write_text(text)
    for folder in [tests, *(path for path in tests.rglob("*") if path.is_dir())]:
        (folder / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/models/hope"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    print(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout[-5000:]
