"""What this machine has, what runs on it, and whether the laws hold there: `nestlearn doctor`.

Each law is a function of a device and a tiny model that returns what is wrong, or nothing.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from nestlearn import options, state
from nestlearn._version import __version__
from nestlearn.memory import Gates
from nestlearn.memory.memories import Matrix
from nestlearn.memory.rules import decay, delta
from nestlearn.models.config import TYPE, saved_config
from nestlearn.models.hope import HopeConfig, HopeLM
from nestlearn.names import weights_folder
from nestlearn.scan import Chunk
from nestlearn.scan.chunk import FORMS, Given, choose, update, why_not

LIBRARIES = ("torch", "triton", "transformers", "safetensors", "numpy")
CLOSE = {"cpu": (1e-8, "float64"), "cuda": (2e-3, "float32")}  # the kernels are of float32
WINDOW = 256  # tokens of the window that a training step is measured on


# ------------------------------------------------------------------------------- what is there


def versions() -> Iterator[tuple[str, str]]:
    """Of nestlearn, Python and the libraries that matter."""
    yield "nestlearn", __version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for name in LIBRARIES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            yield name, "absent"


def machine(place: torch.device) -> Iterator[tuple[str, str]]:
    """The device, its memory, and the disk under this folder."""
    if place.type == "cuda":
        free, total = torch.cuda.mem_get_info(place)
        yield "device", f"{place}, {torch.cuda.get_device_name(place)}"
        yield "its memory", f"{_size(free)} free of {_size(total)}"
    else:
        cores, threads = os.cpu_count() or 1, torch.get_num_threads()
        yield "device", f"{place}, {cores} cores, {threads} threads"
        busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        if threads > 1 and busy + threads > cores + 0.5:
            yield "load", f"{busy:.1f}: others use these cores; try OMP_NUM_THREADS=1"
    if (free_memory := available()) is not None:
        yield "memory", f"{_size(free_memory)} free"
    yield "disk", f"{_size(shutil.disk_usage('.').free)} free in {Path.cwd()}"


def available() -> int | None:
    """Bytes of memory that a process can take; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = dict(line.split(":", 1) for line in lines)
    return int(found["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in found else None


def backends(place: torch.device) -> Iterator[tuple[str, str]]:
    """Every form of a chunk: whether it runs Hope's own chunk here, and if not, why."""
    chunk, given = _call(place)
    chosen = choose(chunk, given, "auto")[0]
    for name in FORMS:
        reason = why_not(name, chunk, given)
        if name == "card" and reason and not find_spec("triton"):
            reason = "Triton is absent"
        elif name == "card" and reason and place.type != "cuda":
            reason = "it needs an NVIDIA GPU that torch can use"
        yield name, f"no: {reason}" if reason else "chosen" if name == chosen else "runs"


def _call(place: torch.device, tokens: int = 32) -> tuple[Any, Any]:
    """A chunk as Hope's memories have it, and a call of it."""
    kind = {"dtype": getattr(torch, CLOSE[_kind(place)][1]), "device": place}
    width = 16
    chunk = Chunk(Matrix(width, width), decay(delta()))
    q, k, v = torch.nn.functional.normalize(torch.randn(3, 2, 4, tokens, width, **kind), dim=-1)
    eta, fade = torch.rand(2, 2, 4, tokens, **kind)
    W = (torch.randn(2, 4, width, width, **kind) / width**0.5,)
    return chunk, Given(W, q, k, v, Gates(eta, fade * -0.1), 0)


def _kind(place: torch.device) -> str:
    return "cuda" if place.type != "cpu" else "cpu"


# ------------------------------------------------------------------------- what a model needs


def needs(folder: Path) -> Iterator[tuple[str, str]]:
    """Bytes to read and to learn, counted from the files of a Hope, a stack or a pretrained model.

    Raises FileNotFoundError or ValueError for a folder without a model.
    """
    folder = weights_folder(folder)
    if (folder / "stack.json").is_file():
        yield from _stack_needs(folder)
        return
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no model in {folder}: it has no config.json")
    if json.loads(path.read_text(encoding="utf-8")).get("model_type") == TYPE:
        yield from _hope_needs(folder)
    else:
        yield "to read", f"{_size(_stored(folder))} of weights, and the cache of its window"
        yield "to learn", "stack it first: nestlearn stack"


def _hope_needs(folder: Path) -> Iterator[tuple[str, str]]:
    config = saved_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    with torch.device("meta"):
        model = HopeLM(config)
        reader = state.nbytes(model.init_state(1))
    weights = _stored(folder)
    yield "to read", f"{_size(weights)} of weights, {_size(reader)} of state for each reader"
    steps = 4 * 4 * model.parameter_count()  # float32: weights, gradients, two of AdamW
    room = available()
    if room is not None and steps > room / 2:
        yield "to train", f"{_size(steps)} with AdamW, and what a window keeps"
        return
    kept = _kept(HopeLM.from_pretrained(folder).float())
    yield "to train", f"{_size(steps)} with AdamW, {_size(kept)} for each window of {WINDOW} tokens"


def _kept(model: Any) -> int:
    """Bytes that the backward pass of one window keeps, without the weights."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        store = x.untyped_storage()
        if store.data_ptr() not in own:
            found[store.data_ptr()] = store.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = model(torch.zeros(1, WINDOW, dtype=torch.int64))[0].logsumexp(-1).sum()
    del loss
    return sum(found.values())


def _stack_needs(folder: Path) -> Iterator[tuple[str, str]]:
    from nestlearn.hf.folder import load_stack

    weights, room = _stored(folder / "base"), available()
    if room is not None and weights > room / 2:
        yield "to read", f"{_size(weights)} of weights: too much to look further here"
        return
    model = load_stack(folder)
    memory = model.memory_bytes()
    yield "to read", f"{_size(weights)} of weights, {_size(memory)} of memory"
    rows = max((level.chunk or 0 for level in model.config.levels), default=0)
    heads = 4 * rows * model.base.config.get_text_config().vocab_size
    yield (
        "to learn",
        f"the same, {_size(memory)} of gradients, {_size(heads)} of logits for {rows} tokens, "
        "and what the blocks keep of them",
    )


def _stored(folder: Path) -> int:
    """Bytes of the weights in a folder's files."""
    files = [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]
    if not files:
        raise FileNotFoundError(f"no weights in {folder}: give a folder that save_pretrained wrote")
    return sum(file.stat().st_size for file in files)


def _size(count: int) -> str:
    for unit, bytes_ in (("GB", 1e9), ("MB", 1e6)):
        if count >= bytes_:
            return f"{count / bytes_:,.1f} {unit}"
    return f"{count / 1e3:,.1f} kB"


# ------------------------------------------------------------------------------------- the laws


def _model(place: torch.device) -> tuple[Any, torch.Tensor]:
    """A tiny Hope and a text of two samples; no length of it is a multiple of a chunk."""
    levels = options.Continuum(tuple(options.Level(chunk) for chunk in (4, 16, None)))
    model = HopeLM(HopeConfig(32, 32, 2, 2, options.Titans(chunk=8), levels))
    dtype = getattr(torch, CLOSE[_kind(place)][1])
    return model.to(place, dtype).eval(), torch.randint(0, 32, (2, 43)).to(place)


def _off(place: torch.device, found: Any, expected: Any) -> str:
    """How far two state trees, or tensors, are apart, where that is too far."""
    worst = 0.0
    for (_, a), (_, b) in zip(state.leaves(found), state.leaves(expected), strict=True):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            gap = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1)
            worst = max(worst, gap.item() if gap.isfinite() else float("inf"))
    return f"off by {worst:.1e}" if worst > CLOSE[_kind(place)][0] else ""


def fast(place: torch.device) -> str:
    """Every form that runs gives what the definition gives: outputs and weights."""
    chunk, given = _call(place)
    W, q, k, v, gates, _ = given
    S = chunk.rule.init(W)
    expected = update(chunk, W, S, q, k, v, gates, backend="naive")[:2]
    for name in FORMS:
        if why_not(name, chunk, given) is None:
            found = update(chunk, W, S, q, k, v, gates, backend=name)[:2]
            if wrong := _off(place, found, expected):
                return f"{name} {wrong}"
    return ""


def streaming(place: torch.device) -> str:
    """A text cut in two anywhere, or read token by token, gives what it gives as a whole."""
    model, ids = _model(place)
    with torch.no_grad():
        whole = model(ids)
        for cuts in ([7], [16], [*range(1, ids.shape[1])]):
            memory, said = None, []
            for piece in ids.tensor_split(cuts, 1):
                logits, memory = model(piece, memory)
                said.append(logits)
            if wrong := _off(place, (torch.cat(said, 1), memory), whole):
                return f"{wrong} when cut at {cuts[0] if len(cuts) == 1 else 'every token'}"
    return ""


def data(place: torch.device) -> str:
    """A memory saved, loaded and continued goes on bit for bit."""
    model, ids = _model(place)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        _, memory = model(ids[:, :21])
        file = Path(folder, "memory.safetensors")
        state.save(memory, file)
        again = state.load(file, like=model.init_state(2), device=place)
        gone_on, loaded = model(ids[:, 21:], memory), model(ids[:, 21:], again)
    same = all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
        for (_, a), (_, b) in zip(state.leaves(loaded), state.leaves(gone_on), strict=True)
    )
    return "" if same else "what was loaded goes on in another way"


def causality(place: torch.device) -> str:
    """A token that changes changes nothing before it."""
    model, ids = _model(place)
    with torch.no_grad():
        before = model(ids)[0]
        other = ids.clone()
        other[:, 29] = (other[:, 29] + 1) % 32
        return _off(place, model(other)[0][:, :29], before[:, :29])


def isolation(place: torch.device) -> str:
    """A sample gives alone what it gives beside others."""
    model, ids = _model(place)
    with torch.no_grad():
        logits, memory = model(ids)
        return _off(place, model(ids[1:]), (logits[1:], state.select(memory, [1])))


LAWS: dict[str, Callable[[Any], str]] = {
    "the fast forms equal the token-by-token definition": fast,
    "causality: a token changes nothing before it": causality,
    "streaming: a text cut elsewhere gives the same": streaming,
    "isolation: a sample gives alone what it gives in a batch": isolation,
    "state is data: saved, loaded and continued is the same": data,
}


def tried(law: Callable[[torch.device], str], place: torch.device) -> str:
    """What is wrong; an error of a law is a law that fails."""
    torch.manual_seed(0)
    try:
        return law(place)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
