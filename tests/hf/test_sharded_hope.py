"""One process ≡ two: a Hope under FSDP2 on the CPU (gloo), its blocks sharded one by one."""

import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from test_modeling import TINY

from nestlearn import Level
from nestlearn.hf import HopeConfig, HopeForCausalLM
from nestlearn.options import Continuum
from pairs import pair

CASES = (
    {},
    {"channel": Continuum((Level(chunk=2, rule="momentum"), Level(chunk=6)), "nested")},
    {"mixer": "attention", "channel": "mlp"},
)


def sharded(rank, _):
    """One of the two: half of the batch, half of every parameter's rows."""
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
        optimizers = [torch.optim.AdamW(lm.parameters(), lr=1e-2, eps=1e-3) for lm, _ in runs]
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
    with pair(sharded, load="nestlearn.hf"):
        pass
