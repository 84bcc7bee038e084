"""One process ≡ two: FSDP2 on the CPU (gloo), every optimizer, and a state that goes on."""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from test_optimizer_laws import ENTRIES, Network, batch, train, weights

from pairs import pair

STEPS = 5
SAME = ("GGD", "M3, exact", "DGD by trace", "DeepMomentum, dot")  # nothing new; GGD: refused
CASES = {name: (entry, torch.float64) for name, entry in ENTRIES.items() if name not in SAME}
CASES["M3, float32"] = (ENTRIES["M3"], torch.float32)  # its memories share a tensor


def alone(entry, dtype):
    torch.manual_seed(0)
    model = Network().to(dtype)
    train(model, entry(model), STEPS)
    return weights(model)


def sharded(rank, _, expected):
    """One of the two: half of the batch, half of every parameter's rows."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, init_device_mesh

    near = {
        torch.float64: {"rtol": 1e-9, "atol": 1e-9},
        torch.float32: {"rtol": 1e-3, "atol": 1e-4},
    }
    mesh = init_device_mesh("cpu", (2,))

    def build(dtype):
        torch.manual_seed(0)
        model = Network().to(dtype)
        model.gain = nn.Parameter(model.gain.detach()[None])  # FSDP2 shards no scalars
        return fully_shard(model, mesh=mesh)

    def run(model, optimizer, start, steps):
        for i in range(start, start + steps):
            optimizer.zero_grad()
            ids, classes = (t[rank * 16 : rank * 16 + 16] for t in batch(i))
            nn.functional.cross_entropy(model(ids), classes).backward()
            optimizer.step()

    def whole(model):
        return [p.full_tensor().detach() for p in model.parameters()]

    for name, (entry, dtype) in CASES.items():
        model = build(dtype)
        optimizer = entry(model)
        run(model, optimizer, 0, 3)
        kept = [p.detach().clone() for p in model.parameters()], optimizer.state_dict()
        twin = build(dtype)
        other = entry(twin)
        with torch.no_grad():
            for p, q in zip(twin.parameters(), kept[0]):
                p.copy_(q)
        other.load_state_dict(kept[1])
        run(model, optimizer, 3, STEPS - 3)
        run(twin, other, 3, STEPS - 3)
        for a, b, c in zip(whole(model), whole(twin), expected[name]):
            assert torch.equal(a, b), name
            torch.testing.assert_close(a.reshape(c.shape), c, **near[dtype], msg=name)
        for p in model.parameters():  # what is shaped like the parameter is sharded like it
            for key, t in optimizer.state[p].items():
                assert isinstance(t, DTensor) == (t.shape == p.shape), (name, key)
        assert get_optimizer_state_dict(model, optimizer)["state"], name


def test_one_process_is_two():
    expected = {name: alone(*case) for name, case in CASES.items()}
    with pair(sharded, expected):
        pass
