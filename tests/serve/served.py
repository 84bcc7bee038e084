"""What the tests of the server share: tiny models, a server in a thread, a client."""

import threading
import time
from contextlib import contextmanager

import httpx
import torch
import uvicorn
from transformers import LlamaConfig, LlamaForCausalLM

from nestlearn import DeltaLevel, HopeConfig, HopeLM, stack_levels
from nestlearn.serve import Limits, engine_for
from nestlearn.serve.app import make_app
from nestlearn.train.data import ByteTokenizer

TEXT = "The key is under the mat. Alice keeps it there, and Bob does not know. "
LIMITS = Limits(requests=100_000)
TOKENS = {"alice": "alice-has-a-long-token", "bob": "bob-has-another-token"}


class Bytes:
    """One token a byte, as transformers' tokenizers are called."""

    def encode(self, text, add_special_tokens=True):
        return list(text.encode())

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode(errors="replace")


def stacked(seed=0, positions=512, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 256, "hidden_size": 16, "intermediate_size": 24}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(
        **sizes, **heads, max_position_embeddings=positions, eos_token_id=None, bos_token_id=None
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)
    levels = [DeltaLevel(8, lr=0.3, rule="gd"), DeltaLevel(32, lr=0.1, rule="gd")]
    return stack_levels(model, levels, window=64, **options)


def hope(seed=0):
    torch.manual_seed(seed)
    return HopeLM(HopeConfig(dim=16, layers=1, heads=2, chunk=8))


def engine(kind="stacked", **options):
    if kind == "hope":
        return engine_for(hope(**options), ByteTokenizer(), "tiny")
    return engine_for(stacked(**options), Bytes(), "tiny")


@contextmanager
def serving(app):
    """The application behind a port of this machine; its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=10)


@contextmanager
def client(root, kind="stacked", limits=LIMITS, tokens=None, **options):
    """A client of a server over this folder."""
    with (
        serving(make_app(engine(kind, **options), root, limits, tokens)) as url,
        httpx.Client(base_url=url, timeout=30) as asks,
    ):
        yield asks


def as_user(name):
    return {"Authorization": f"Bearer {TOKENS[name]}"}


def learned(asks, name, text=TEXT, **options):
    """A memory that has learned a text; the job."""
    if asks.get(f"/v1/memories/{name}", **options).status_code == 404:
        made = asks.post("/v1/memories", json={"name": name}, **options)
        assert made.status_code == 201, made.text
    begun = asks.post(
        f"/v1/memories/{name}/learn", json={"text": text, "source": "note"}, **options
    )
    assert begun.status_code == 202, begun.text
    return ended(asks, begun.json()["id"], **options)


def ended(asks, job, **options):
    while (told := asks.get(f"/v1/jobs/{job}", **options).json())["state"] in (
        "waiting", "running",
    ):  # fmt: skip
        time.sleep(0.005)
    return told


def says(asks, text="The key", tokens=12, model="tiny", **more):
    """A greedy completion; options that are no fields go to httpx."""
    headers = more.pop("headers", None)
    body = {"model": model, "prompt": text, "max_tokens": tokens, "temperature": 0, **more}
    made = asks.post("/v1/completions", json=body, headers=headers)
    assert made.status_code == 200, made.text
    return made.json()["choices"][0]["text"]


def events(response):
    """The data of a stream of events, [DONE] left out."""
    import json

    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
