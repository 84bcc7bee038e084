"""One process ≡ two: a Hope under FSDP2 on the CPU (gloo), its blocks sharded one by one; by hand,
by accelerate, and by transformers' Trainer.
"""

import copy
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from test_modeling import TINY

from nestlearn import Level
from nestlearn.hf import HopeConfig, HopeForCausalLM
from nestlearn.options import Continuum
from pairs import pair

ADAMW = {"lr": 1e-2, "eps": 1e-3}
CASES = (
    {},
    {"channel": Continuum((Level(chunk=2, rule="momentum"), Level(chunk=6)), "nested")},
    {"mixer": "attention", "channel": "mlp"},
)


def every_way(rank, folder):
    """One of the two: half of the batch, half of every parameter's rows."""
    sharded(rank)
    here = {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(number) for name, number in here.items()}
    shards_on_the_cpu()
    for way in (accelerated, trained):
        whole, ids = started()
        optimizer = torch.optim.AdamW(whole.parameters(), weight_decay=0, **ADAMW)
        for _ in range(2):
            optimizer.zero_grad()
            whole(ids, labels=ids).loss.backward()
            optimizer.step()
        half = way(folder, *started())
        assert all(isinstance(part, FSDPModule) for part in (half, *half.model.blocks)), way
        for (name, p), q in zip(whole.named_parameters(), half.parameters()):
            torch.testing.assert_close(
                q.full_tensor(), p, rtol=1e-6, atol=1e-8, msg=f"{way.__name__} {name}"
            )


def started():
    torch.manual_seed(0)
    return HopeForCausalLM(HopeConfig(**TINY)).double(), torch.randint(0, 17, (4, 14))


def shards_on_the_cpu():
    """Accelerate 1.15 shards on cards alone: elsewhere it forgets its plugin, and takes DDP."""
    make = AcceleratorState.__init__

    def on_any_device(self, *given, fsdp_plugin=None, **options):
        make(self, *given, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = on_any_device


def accelerated(_, lm, ids):
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    lm, optimizer, rows = accelerator.prepare(
        lm,
        torch.optim.AdamW(lm.parameters(), weight_decay=0, **ADAMW),
        torch.utils.data.DataLoader(ids, batch_size=2),
    )
    for _ in range(2):
        for some in rows:
            optimizer.zero_grad()
            accelerator.backward(lm(some, labels=some).loss)
            optimizer.step()
    return lm


def trained(folder, lm, ids):
    arguments = TrainingArguments(
        str(folder), fsdp=True, use_cpu=True, max_steps=2, per_device_train_batch_size=2,
        learning_rate=ADAMW["lr"], adam_epsilon=ADAMW["eps"], lr_scheduler_type="constant",
        max_grad_norm=0, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(lm, arguments, train_dataset=[{"input_ids": x, "labels": x} for x in ids])
    trainer.train()
    return trainer.model


def sharded(rank):
    """By torch itself."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    for case, changes in enumerate(CASES):
        torch.manual_seed(0)
        whole = HopeForCausalLM(HopeConfig(**{**TINY, **changes})).double()
        ids = torch.randint(0, 17, (4, 14))
        half = copy.deepcopy(whole)
        for block in half.model.blocks:
            if case == 1:  # smaller parts, too
                for mlp in block.channel.mlps:
                    fully_shard(mlp, mesh=mesh)
            fully_shard(block, mesh=mesh)
        fully_shard(half, mesh=mesh)
        runs = [(whole, ids), (half, ids[2 * rank : 2 * rank + 2])]
        optimizers = [torch.optim.AdamW(lm.parameters(), **ADAMW) for lm, _ in runs]
        for _ in range(2):
            for (lm, some), optimizer in zip(runs, optimizers):
                optimizer.zero_grad()
                lm(some, labels=some).loss.backward()
                optimizer.step()
        for (name, p), q in zip(whole.named_parameters(), half.parameters()):
            torch.testing.assert_close(
                q.full_tensor(), p, rtol=1e-6, atol=1e-8, msg=f"{case} {name}"
            )
        with torch.no_grad():
            logits = [lm(some).logits for lm, some in runs]
        torch.testing.assert_close(logits[1], logits[0][2 * rank : 2 * rank + 2])


def test_two_processes_train_as_one():
    with pair(every_way):
        pass
