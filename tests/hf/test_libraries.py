"""PEFT, TRL and lm-eval take a Hope as they take any model; skipped where they are absent."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_modeling import GREEDY, model, some_rows


def lora(**options):
    peft = pytest.importorskip("peft")
    names = ["query", "out", "gate", "value"]
    return peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=names, **options)


def test_peft_trains_an_adapter(tmp_path):
    config = lora()
    import peft

    torch.manual_seed(0)
    adapted = peft.get_peft_model(model().float(), config)
    ids = torch.stack(some_rows(9, 9))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        losses.append(adapted(input_ids=ids, labels=ids).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    adapted.eval()
    want = adapted(input_ids=ids).logits
    assert losses[-1] < losses[0]
    assert adapted.generate(input_ids=ids, **GREEDY).shape == (2, 16)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(model().float(), tmp_path).eval()
    torch.testing.assert_close(again(input_ids=ids).logits, want)
    torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, want, rtol=1e-4, atol=1e-4)


def test_peft_learns_a_prompt():
    peft = pytest.importorskip("peft")
    sizes = {"token_dim": 16, "num_layers": 1, "num_attention_heads": 2}
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **sizes)
    adapted = peft.get_peft_model(model().float(), config)
    ids = torch.stack(some_rows(9, 9))
    out = adapted(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    out.loss.backward()
    assert out.logits.shape == (2, 12, 17)
    (trained,) = [p for p in adapted.parameters() if p.requires_grad]
    assert float(trained.grad.abs().sum()) > 0


@pytest.mark.parametrize("kind", ["SFT", "packed", "DPO"])
def test_trl_trains(kind, tmp_path, tokenizer):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    torch.manual_seed(0)
    options = {"packing": True, "max_length": 16} if kind == "packed" else {}
    name = "DPO" if kind == "DPO" else "SFT"
    rows = [{"prompt": f"{i}: ", "chosen": "abc", "rejected": "xyz"} for i in range(10)]
    texts = [{"text": f"one two three {i}"} for i in range(20)]
    other = {"ref_model": model(vocab_size=259).float()} if kind == "DPO" else {}
    config = getattr(trl, f"{name}Config")(
        str(tmp_path), max_steps=5, per_device_train_batch_size=2, learning_rate=1e-2, bf16=False,
        logging_steps=1, save_strategy="no", use_cpu=True, report_to=[], disable_tqdm=True,
        **options,
    )  # fmt: skip
    trainer = getattr(trl, f"{name}Trainer")(
        model(vocab_size=259).float(), args=config, processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows if kind == "DPO" else texts), **other,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 5
    assert losses[-1] < 0.9 * losses[0]


@pytest.fixture
def tokenizer():
    """Bytes and the marks of an end and of padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_ = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token="<end>", pad_token="<pad>")


def test_lm_eval_scores_a_folder_without_an_import(tmp_path, tokenizer):
    pytest.importorskip("lm_eval")
    model(vocab_size=259).float().save_pretrained(tmp_path / "hope")
    tokenizer.save_pretrained(tmp_path / "hope")
    (tmp_path / "letters.jsonl").write_text('{"ask": "letter", "right": 1}\n' * 4)
    (tmp_path / "letters.yaml").write_text(
        "task: letters\ndataset_path: json\ntest_split: train\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {tmp_path / 'letters.jsonl'}}}\n"
        "doc_to_text: '{{ask}}'\ndoc_to_choice: [' a', ' b']\ndoc_to_target: '{{right}}'\n"
    )
    command = [
        "-m", "lm_eval", "--model", "hf", "--tasks", "letters", "--include_path", ".", "--device",
        "cpu", "--model_args", "pretrained=hope,trust_remote_code=True",
    ]  # fmt: skip
    env = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert "|letters|" in done.stdout, done.stderr[-2000:]
