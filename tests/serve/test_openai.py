"""OpenAI's own client, against the server."""

import re
import shlex
from pathlib import Path

import pytest
from served import client, learned


@pytest.fixture(scope="module")
def openai():
    """Imported by the one that runs these tests: it takes a second."""
    return pytest.importorskip("openai", reason="needs the package openai")


def test_the_client_talks(openai, tmp_path):
    with client(tmp_path) as asks:
        learned(asks, "mine")
        api = openai.OpenAI(base_url=f"{asks.base_url}/v1", api_key="none", max_retries=0)
        assert [model.id for model in api.models.list()] == ["tiny", "tiny:mine"]
        options = {"model": "tiny:mine", "temperature": 0, "max_tokens": 8}
        talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The key?"}]
        made = api.chat.completions.create(messages=talk, **options)
        assert made.usage.completion_tokens == 8
        said = made.choices[0].message.content
        parts = list(
            api.chat.completions.create(
                messages=talk, stream=True, stream_options={"include_usage": True}, **options
            )
        )
        assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == said
        assert parts[-1].usage.total_tokens == made.usage.total_tokens
        text = api.completions.create(prompt="The key", **options).choices[0].text
        beside = api.completions.create(
            prompt="The key", **{**options, "model": "tiny"}, extra_body={"memory": "mine"}
        )
        assert beside.choices[0].text == text
        with pytest.raises(openai.NotFoundError, match="no memory 'other'") as refused:
            api.completions.create(model="tiny:other", prompt="a")
        assert refused.value.code == "memory_not_found"
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            api.completions.create(model="tiny", prompt="a", max_tokens=0)


def test_the_pages_code_runs(openai, tmp_path, capsys):
    page = (Path(__file__).parents[2] / "docs/serve.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    with client(tmp_path) as asks:
        learned(asks, "mine")
        here = block.replace("http://127.0.0.1:8000", str(asks.base_url).rstrip("/"))
        here = here.replace("stacked:mine", "tiny:mine").replace(
            "messages=", "max_tokens=4, messages="
        )
        exec(here, {})
        assert asks.get("/v1/memories/mine").json()["position"] > len("Who keeps the lighthouse?")
        (curl,) = re.findall("^curl .*", page, re.M)
        _, url, _, header, _, data = shlex.split(curl)
        sent = dict([header.split(": ")])
        answer = asks.post(url.removeprefix("http://127.0.0.1:8000"), content=data, headers=sent)
        assert answer.json()["usage"]["completion_tokens"] == 40
    assert capsys.readouterr().out
