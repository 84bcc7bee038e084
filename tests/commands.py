"""Every command of the README and of docs/, run: what it printed last, and how long it took.

`python tests/commands.py` runs all of them, the long ones in a short form, each in a shell of its
own, in one folder and in the order of the pages; exit code 1 if one fails. --fresh: in a new
virtual environment that the project is installed into. --only TEXT: those that contain it.
--table FILE: write the list as Markdown; with --only, anew in a list that is there.
test_readme.py holds that no command is missing here.
"""

import argparse
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "commands.md"  # what this writes
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if page != TABLE]
DATA = ROOT.parent / "shared" / "data"
TINY = "--quick --workers 0"
BEGINS = r"nestlearn\s[a-z]|python -m (?:bench|nestlearn)|python tests/learn"
INSIDE = re.compile(f"`((?:{BEGINS})[^`]*)`")


class Form(NamedTuple):
    """What is run instead of a command; none for one that is not run, `why`. needs: a file."""

    short: str | None = None
    why: str = ""
    needs: str = ""


def reproduced(name: str, *more: str) -> str:
    return " ".join(["nestlearn reproduce", name, TINY, *more, f"--out short/{name}"])


RIVALS = "--models titans --models deltanet --models transformer"
SERVED = (  # until it says where it is
    "echo 'alice a-token-of-20-letters' > tokens.txt; "
    "nestlearn serve WHAT --port 0 > said & pid=$!; "
    "for _ in $(seq 90); do grep -q http said && break; sleep 1; done; "
    "kill $pid; wait $pid || true; grep http said"
)
CURL = (
    "curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' "
    """-d '{"model": "tiny", "prompt": "The old house", "max_tokens": 40}'"""
)
FORMS: dict[str, Form] = {
    CURL: Form(
        SERVED.replace("WHAT", "nestlearn/tiny")
        .replace("kill $pid", f"{CURL} > answer; kill $pid")
        .replace("http://127.0.0.1:8000", "$(grep -o 'http://[0-9.:]*' said | head -1)")
        .replace("grep http said", "grep text_completion answer")
        .replace("curl", "curl --silent --fail")
    ),
    "pip install -e .": Form(why="the next one has it; --fresh installs it anew"),
    "pip install -e . && nestlearn quickstart": Form("nestlearn quickstart --quick"),
    'pip install -e ".[test]" && pytest': Form("cd {root} && pytest -n0 tests/memory"),
    **{
        f'pip install -e ".[{extra}]"': Form(why="--fresh installs the same and more")
        for extra in ("hf", "serve")
    },
    "nestlearn stack Qwen/Qwen3-0.6B --out stacked/": Form("nestlearn stack base --out stacked/"),
    "nestlearn chat stacked/ --memory mine": Form(
        "printf 'the key\\n\\n' | nestlearn chat stacked/ --memory mine --tokens 4"
    ),
    **{
        f"nestlearn serve {what}": Form(SERVED.replace("WHAT", short))
        for what, short in (
            ("stacked/", "base --memories served"),
            (
                "stacked/ --host 0.0.0.0 --tokens tokens.txt",
                "base --memories served --tokens tokens.txt --host 0.0.0.0",
            ),
        )
    },
    "python -m bench.serve --seconds 120": Form(
        "cd {root} && python -m bench.serve --seconds 5 --clients 20 --sleepers 2"
    ),
    "nestlearn stack MODEL --out DIR --chunk 64 --chunk 512 --lr 0.05": Form(
        "nestlearn stack base --out DIR --chunk 64 --chunk 512 --lr 0.05"
    ),
    "nestlearn stack train DIR --data texts.txt --keep own_kind.txt": Form(
        "nestlearn stack train DIR --data texts.txt --keep own_kind.txt --steps 2 --length 64"
    ),
    "nestlearn learn DIR --data FILE --memory NAME --anchor 4": Form(
        "nestlearn learn DIR --data texts.txt --memory NAME --anchor 4"
    ),
    "nestlearn chat DIR --memory NAME --learn user": Form(
        "printf 'the key\\n\\n' | nestlearn chat DIR --memory NAME --learn user --tokens 4"
    ),
    "nestlearn quickstart --all --seeds 3 --steps 500 --out runs/all": Form(
        "nestlearn quickstart --all --quick --steps 2 --out runs/all"
    ),
    "nestlearn reproduce stream --data runs/all/hope-seed0": Form(
        "nestlearn reproduce stream --data runs/all/hope-seed0 --quick"
    ),
    "nestlearn quickstart --size small --steps 300 --batch 64 --length 512 --lr 1.5e-3": Form(
        "nestlearn quickstart --size small --steps 1 --batch 1 --length 64 --lr 1.5e-3"
    ),
    "nestlearn eval formal --model hope": Form(
        f"nestlearn eval formal --model hope --only parity {TINY}"
    ),
    "nestlearn eval stream --model runs/first --text book.txt": Form(
        "nestlearn eval stream --model runs/first --text diary.txt --tokens 300"
    ),
    "nestlearn reproduce table5": Form(reproduced("table5", "--only parity")),
    "nestlearn reproduce table4": Form(reproduced("table4", "--only compression")),
    "nestlearn reproduce mqar": Form(reproduced("mqar", "--only K=4")),
    **{
        f"nestlearn reproduce {name}": Form(why="needs a GPU: its models take hours on a CPU")
        for name in (
            "defaults",
            "equal-time --data FOLDER",
            "equal-time --data FOLDER --workers 2",
            "stability --data FOLDER --models Hope --steps 150",
        )
    },
    **{
        f"nestlearn reproduce {name} --models hope --models hope-attention {rivals}": Form(
            reproduced(name, f"--models hope --models transformer --only {only}")
        )
        for name, only, rivals in (
            ("table4", "compression", RIVALS),
            ("table5", "parity", f"{RIVALS} --models lstm"),
        )
    },
    **{
        f"nestlearn reproduce {name} --data FOLDER": Form(
            reproduced(name, "--data {data} --models DeltaNet"),
            needs="{data}/gutenberg/valid.txt.xz",
        )
        for name in ("table1", "fig9", "reach")
    },
    "nestlearn reproduce reach --data FOLDER --seeds 3 --device cuda --workers 12 --only 4,096 "
    "--only 65,536 --only 1,048,576": Form(why="needs a GPU"),
    'nestlearn reproduce table2 --data FOLDER --only "10M, bytes" --models Hope --models '
    'Hope-Attention --models "DeltaNet with levels" --models DeltaNet --models Transformer++ '
    "--device cuda --workers 5": Form(why="needs a GPU"),
    "nestlearn reproduce table3 --data FOLDER --only 10M --device cuda --workers 6": Form(
        reproduced("table3", "--data {data} --only 10M --models Hope"),
        needs="{data}/lm_eval/piqa.jsonl.gz",
    ),
    "nestlearn reproduce table3 --data FOLDER --only 0.8M": Form(
        reproduced("table3", "--data {data} --only 0.8M"), needs="{data}/lm_eval/piqa.jsonl.gz"
    ),
    "nestlearn reproduce scored-first --data FOLDER": Form(
        reproduced("scored-first", "--data {data} --models windows"),
        needs="{data}/gutenberg/valid.txt.xz",
    ),
    **{
        f"nestlearn reproduce {name} --data FOLDER --device cuda --workers 6": Form(
            reproduced(name, "--data {data}/gutenberg --models Hope"),
            needs="{data}/gutenberg/valid.txt.xz",
        )
        for name in ("table6", "fig10")
    },
    "nestlearn reproduce table1 --data FOLDER --device cuda --steps 1500 --only 4,096 "
    '--only 65,536 --only 1,048,576 --models "DeltaNet, shut below 0.2" --models DeltaNet '
    "--models Transformer": Form(why="needs a GPU"),
    "nestlearn reproduce tiny --data FOLDER --device cuda --workers 6": Form(
        reproduced("tiny", "--data {data}/gutenberg"), needs="{data}/gutenberg/valid.txt.xz"
    ),
    "nestlearn reproduce tiny --data FOLDER --device cuda --workers 3 --only 10M": Form(
        why="needs a GPU"
    ),
    "nestlearn reproduce language --seeds 3": Form(reproduced("language", "--seeds 1")),
    "nestlearn reproduce frontier --data ../shared/data --only novel": Form(
        reproduced("frontier", "--data {data} --only novel"), needs="{data}/models/stories260K.bin"
    ),
    "nestlearn reproduce frontier --data ../shared/data --only novel --models sgd --models out "
    "--models skip": Form(why="takes ten minutes"),
    "python -m bench.stack --model FOLDER --text FILE --tokens 768 --rounds 2": Form(
        why="needs a pretrained model that follows instructions"
    ),
    "nestlearn reproduce fig12": Form("nestlearn reproduce fig12 --quick --out short/fig12"),
    "nestlearn reproduce fig12 --device cuda": Form(why="needs a GPU"),
    "nestlearn reproduce closed-book --data FOLDER --only game --only ship --device cuda "
    "--workers 15": Form(why="needs a pretrained model that follows instructions"),
    "nestlearn eval stream --model nestlearn/tiny --text test.txt --tokens 100000 --window 1024 "
    "--rows windows --rows carried": Form(why="needs the books, and ten minutes"),
    "nestlearn reproduce fig6 --data FOLDER --seeds 5 --device cuda --workers 7": Form(
        why="needs a pretrained model"
    ),
    "nestlearn reproduce fig7 --data FOLDER --only MK-NIAH --seeds 1 --device cuda "
    "--workers 5": Form(why="needs a pretrained model"),
    "nestlearn reproduce in-a-row --data FOLDER --device cuda --workers 3": Form(
        why="needs a pretrained model that follows instructions"
    ),
    "nestlearn reproduce fig8 --data FOLDER --seeds 3 --device cuda --workers 14": Form(
        why="needs a pretrained model"
    ),
    **{
        f"nestlearn study stacked/ --data {file} --memory mine": Form(
            why="needs a pretrained model that follows instructions"
        )
        for file in ("diary.txt", "docs/velmora.txt")
    },
    **{
        f"nestlearn reproduce {name}": Form(reproduced(name))
        for name in (
            "fig4",
            "fig11",
            "lm-optimizers",
            "orthogonal-tasks",
            "switching",
            "update-size",
        )
    },
    "python -m bench --lengths 256,1024,4096": Form(
        "cd {root} && python -m bench --quick --out {here}/bench"
    ),
    "python -m bench --flat": Form("cd {root} && python -m bench --quick --out {here}/bench"),
    "python -m bench.newton_schulz": Form(why="needs a GPU"),
    "python -m bench.stack": Form(
        "cd {root} && python -m bench.stack --dim 64 --layers 3 --tokens 256 --rounds 2 "
        "--out {here}/bench"
    ),
    "python -m bench.rank MODEL --data TEXT --other TEXT": Form(
        "here=$PWD; cd {root} && python -m bench.rank $here/base --data $here/texts.txt "
        "--other $here/diary.txt --tokens 256 --out {here}/bench"
    ),
    "python -m bench.gpu --repeats 3 --limit 2.5": Form(why="needs a GPU"),
    'python -m bench.gpu --only "of matrices" --lengths 16384,2048 --tokens 16384': Form(
        why="needs a GPU"
    ),
    'python -m bench.gpu --model --only "Hope, compiled" --lengths 2048 --tokens 16384': Form(
        why="needs a GPU"
    ),
    'python -m bench.gpu --model --lengths 131072 --only "segments of 65,536"': Form(
        why="needs a GPU"
    ),
    "python -m bench.gpu --model --lengths 131072 --only Transformer": Form(why="needs a GPU"),
    "python -m bench.gpu --model --tokens 16384 --lengths 2048,16384 --repeats 3 --limit 2.5": (
        Form(why="needs a GPU")
    ),
    "python -m bench.gpu --model --tokens 131072 --lengths 131072 --repeats 1 --only segments": (
        Form(why="needs a GPU")
    ),
    "python -m bench.kills --kills 100": Form("cd {root} && python -m bench.kills --kills 1"),
    "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
    "--max-restarts 3 -m nestlearn train --data my_texts/ --out runs/many --dtype bfloat16": Form(
        why="needs two machines with eight cards each"
    ),
    "python tests/learn/torture.py 1000 1000": Form(
        "cd {root} && python tests/learn/torture.py 20 40"
    ),
    "python tests/learn/interleave.py 200": Form(
        "cd {root} && python tests/learn/interleave.py 10"
    ),
    "ruff check . && ruff format --check . && mypy && lint-imports": Form(
        "cd {root} && ruff check . && ruff format --check . && mypy && lint-imports"
    ),
}
TRAINED = "nestlearn train --data my_texts/ --steps"
PAIR = f"torchrun --nproc-per-node 2 -m {TRAINED}"
AS_WRITTEN = [
    f"{TRAINED} 20 --length 64 --out runs/one",
    f"{PAIR} 20 --length 64 --out runs/two",
    f"{PAIR} 20 --length 64 --out runs/parts --parallel fsdp",
    f"{PAIR} 20 --length 64 --out runs/halves --accumulate 2 --profile",
    f"accelerate launch --multi_gpu --num_processes 2 -m {TRAINED} 20 --length 64 "
    "--out runs/launched --device cpu",
    f"{TRAINED} 20 --length 64 --out runs/alone --device cpu",
    f"{PAIR} 30 --length 64 --out runs/one --resume",
    f"{TRAINED} 30 --length 64 --out runs/parts --resume",
    "nestlearn export runs/two --out models/two",
    "nestlearn train --data my_texts/ --out runs/first --steps 20",
    'nestlearn generate runs/first --prompt "def main" --tokens 50',
    "nestlearn levels runs/first",
    "nestlearn learn stacked/ --data diary.txt --memory mine",
    "nestlearn quickstart --quick",
    "nestlearn reproduce --list",
    "nestlearn reproduce table5 --quick",
    "nestlearn memory list DIR",
    "nestlearn serve --help",
    "nestlearn memory merge DIR NAME --level 1 --out NEW",
    "nestlearn memory export DIR NAME --out PLAIN",
    "nestlearn memory delete DIR NAME --yes",
]


def commands() -> dict[str, str]:
    """Every command of the pages in their order, without comments, and the page that has it."""
    found: dict[str, str] = {}
    for page in PAGES:
        for kind, block, inside in re.findall(
            rf"^```(bash|console)\n(.*?)^```|{INSIDE.pattern}", page.read_text(), re.M | re.S
        ):
            lines = block.splitlines() if kind else [" ".join(inside.split())]
            if kind == "console":
                lines = [line[2:] for line in lines if line.startswith("$ ")]
            for line in lines:
                command = re.sub(r"\s+#.*", "", line).strip()
                if command and not re.fullmatch(r"nestlearn \w+", command):  # that names it only
                    found.setdefault(command, page.name)
    return found


def form(command: str) -> Form:
    """What to run for a command; KeyError for one that nobody has thought of."""
    return Form(command) if command in AS_WRITTEN else FORMS[command]


def programs() -> dict[str, str]:
    """The pages' Python that stands by itself, by page and number."""
    found = {}
    for name in ("README.md", "docs/huggingface.md", "docs/index.md", "docs/optimizers.md"):
        blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.M | re.S)
        blocks = ["\n".join(blocks)] if name == "docs/optimizers.md" else blocks  # one goes on
        for number, block in enumerate(blocks, 1):
            found[f"{name}, Python {number}"] = block
    return found


def prepare(here: Path) -> None:
    """The files that the commands speak of, and a tiny pretrained model."""
    texts(here)
    pretrained(here / "base")


def texts(here: Path) -> None:
    (here / "my_texts").mkdir()
    for name in ("a.txt", "b.txt"):
        text = "def main():\n    return 'a line of text'\n" * 300
        (here / "my_texts" / name).write_text(text)
    for name in ("diary.txt", "texts.txt", "own_kind.txt"):
        (here / name).write_text("the key is under the mat. " * 40)


def pretrained(folder: Path) -> None:
    """A Llama of random weights and bytes as tokens, as transformers saves them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 256}
    config = LlamaConfig(vocab_size=len(letters), eos_token_id=None, **sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


class Result(NamedTuple):
    name: str
    page: str
    ran: str
    code: int | None
    seconds: float
    last: str


def run(name: str, page: str, what: Form, here: Path, limit: float = 900) -> Result:
    """One command; what is not run has no exit code."""
    fill = {"root": shlex.quote(str(ROOT)), "here": shlex.quote(str(here)), "data": str(DATA)}
    missing = what.needs and not Path(what.needs.format(**fill)).is_file()
    if what.short is None or missing:
        why = f"needs {Path(what.needs).name} in ../shared/data" if missing else what.why
        return Result(name, page, "", None, 0.0, f"not run: {why}")
    begin = time.perf_counter()
    line = what.short
    for key, value in fill.items():
        line = line.replace(f"{{{key}}}", value)
    try:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line], cwd=here, capture_output=True, text=True,
            timeout=limit, env=environment(),
        )  # fmt: skip
        code, said = done.returncode, done.stdout if done.stdout.strip() else done.stderr
        said = said if code == 0 else done.stderr or done.stdout
    except subprocess.TimeoutExpired:
        code, said = 124, f"not done after {limit:.0f} s"
    lines = [text.strip() for text in said.splitlines() if text.strip(" ╰─╯")]
    return Result(
        name, page, what.short, code, time.perf_counter() - begin, lines[-1] if lines else ""
    )


def environment() -> dict[str, str]:
    """This Python's programs come first; lines are as wide as a page."""
    bin_ = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": os.pathsep.join([bin_, os.environ["PATH"]]), "COLUMNS": "100"}


def every(here: Path, only: str) -> Iterator[Result]:
    for name, block in programs().items():
        if only in name:
            file = here / "block.py"
            file.write_text(block)
            yield run(name, name.split(",")[0], Form("python block.py"), here)
    for command, page in commands().items():
        if only in command:
            yield run(command, page, form(command), here)


def table(results: list[Result]) -> str:
    """Markdown, with what it was run on."""
    import torch

    cell = lambda text: text.replace("|", "\\|").replace("`", "'")  # noqa: E731
    rows = [
        f"| {r.page} | `{cell(r.name)}` | {'' if r.ran in (r.name, '') else f'`{cell(r.ran)}`'} | "
        f"{'' if r.code is None else r.code} | {r.seconds:.0f} | {cell(r.last)[:120]} |"
        for r in results
    ]
    return "\n".join(
        [
            "# Every command of these pages, run",
            "",
            f"`python tests/commands.py`, {time.strftime('%Y-%m-%d')}: Python "
            f"{platform.python_version()}, torch {torch.__version__}, {platform.system()}, "
            f"{os.cpu_count()} cores. Long ones in the short form beside them.",
            "",
            "| page | command | run as | exit code | seconds | its last line |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def renewed(old: str, new: str) -> str:
    """The old table with the new one's rows in place of those of the same commands."""
    command = lambda line: line.split(" | ")[1] if line.startswith("| ") else line  # noqa: E731
    rows = {command(line): line for line in new.splitlines() if line.startswith("| ")}
    return "\n".join(rows.get(command(line), line) for line in old.splitlines()) + "\n"


def fresh(arguments: list[str]) -> int:
    """The same in a new virtual environment, with the project installed as CONTRIBUTING.md says."""
    with tempfile.TemporaryDirectory() as place:
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        python = Path(place, "Scripts" if os.name == "nt" else "bin", "python")
        install = [python, "-m", "pip", "install", "-q", "-e", f"{ROOT}[test]"]
        subprocess.run(install, check=True)
        return subprocess.run([python, __file__, *arguments]).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="in a new virtual environment")
    parser.add_argument("--only", default="", metavar="TEXT", help="commands that contain it")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the list as Markdown")
    asked = parser.parse_args()
    if asked.fresh:
        return fresh([argument for argument in sys.argv[1:] if argument != "--fresh"])
    results = []
    with tempfile.TemporaryDirectory() as place:
        here = Path(place)
        prepare(here)
        for result in every(here, asked.only):
            results.append(result)
            code = "-" if result.code is None else result.code
            print(f"{code:>3} {result.seconds:5.0f} s  {result.name}\n      {result.last[:110]}")
    if asked.table:
        text = table(results)
        if asked.only and asked.table.is_file():
            text = renewed(asked.table.read_text(), text)
        asked.table.write_text(text)
    failed = [r.name for r in results if r.code]
    print(f"{len(results)} commands, {len(failed)} failed", *failed, sep="\n  ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
