"""A memory in use: every thread reads it, says what it reads, or is told; so is a backward pass."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from stacks import tiny, tokens

from nestlearn import DeltaLevel, Session, stack_levels

PROMPT = tokens(1, 9, seed=7)


def stacked(seed=0):
    return stack_levels(tiny(seed=seed), [DeltaLevel(4, lr=0.5, bound=None, rule="dgd")])


@pytest.fixture(scope="module")
def model():
    return stacked()


@pytest.fixture(scope="module")
def memories(model):
    return [model.learn(tokens(1, 30, seed=seed))[1] for seed in (1, 2)]


@pytest.fixture
def says(model):
    """The base model's logits, without and with each memory; and how to compute them."""
    return lambda memory=None: model(PROMPT, memory).logits.detach()


def logits(model):
    return model.base(PROMPT).logits.detach()


def in_thread(work):
    """The result of work in a thread of its own, started now."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_a_thread_started_inside_reads_the_memory_also_after_the_end(model, memories, says):
    first, second = memories
    assert not torch.equal(says(first), says(second))
    with model.using(first):
        late = ThreadPoolExecutor(1)
        late.submit(int).result()
        assert torch.equal(in_thread(lambda: logits(model)), says(first))
        with model.using(second):
            assert torch.equal(in_thread(lambda: logits(model)), says(second))
        with model.using(None):
            assert torch.equal(in_thread(lambda: logits(model)), says())
        assert torch.equal(in_thread(lambda: logits(model)), says(first))
    assert torch.equal(late.submit(logits, model).result(), says(first))
    assert torch.equal(logits(model), says())
    assert torch.equal(in_thread(lambda: logits(model)), says())
    late.shutdown()


def test_an_older_thread_says_what_it_reads(model, memories, says):
    first, second = memories
    with ThreadPoolExecutor(1) as old:
        old.submit(int).result()
        with model.using(first):
            with pytest.raises(ValueError, match=r"enter using\(memory\), or using\(None\)"):
                old.submit(logits, model).result()

            def own(memory):
                with model.using(memory):
                    return logits(model)

            assert torch.equal(old.submit(own, second).result(), says(second))
            assert torch.equal(old.submit(own, None).result(), says())
            loss, _ = old.submit(model.learn, PROMPT).result()
        assert torch.equal(loss.nan_to_num(), model.learn(PROMPT)[0].nan_to_num())
        assert torch.equal(old.submit(logits, model).result(), says())


def test_blocks_of_two_threads_stay_apart(model, memories, says):
    together, found = threading.Barrier(2), {}

    def work(memory):
        with model.using(memory):
            together.wait()
            found[id(memory)] = logits(model)
            together.wait()

    threads = [threading.Thread(target=work, args=(memory,)) for memory in memories]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[id(memory)], says(memory)) for memory in memories)


def test_memories_of_two_models_are_used_together(model, memories, says):
    other = stacked(seed=1)
    _, theirs = other.learn(PROMPT)
    with model.using(memories[0]), other.using(theirs):
        assert torch.equal(logits(model), says(memories[0]))
    with pytest.raises(ValueError, match="another model's weights"):
        other.generate(PROMPT, model.weights(memories[0]))


def test_training_inside_reaches_the_base_models_weights():
    model = stacked()
    _, memory = model.learn(tokens(1, 30, seed=1))
    with model.using(memory):
        model.base(PROMPT, labels=PROMPT).loss.backward()
        grads = [layer.weight.grad.clone() for layer in model.layers]
        model.base.zero_grad()
        with torch.no_grad():
            model.layers[0].weight.add_(1.0)
        with pytest.raises(ValueError, match="weights have changed since the memory was added"):
            model.base(PROMPT)
        with torch.no_grad():
            model.layers[0].weight.sub_(1.0)
    merged = stacked()
    merged.merge(merged.learn(tokens(1, 30, seed=1))[1], 0)
    merged.base(PROMPT, labels=PROMPT).loss.backward()
    for grad, layer in zip(grads, merged.layers):
        assert (grad - layer.weight.grad).abs().max() < 1e-4 * grad.abs().max()


def test_a_sessions_weights_follow_the_base_models():
    model = stacked()
    one = Session(model)
    one.learn(tokens(1, 30, seed=1))
    options = {"max_new_tokens": 5, "do_sample": False}
    said = one.generate(PROMPT, **options)
    for twin in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert torch.equal(twin.generate(PROMPT, **options), said)
    with torch.no_grad():
        model.layers[-1].weight.mul_(-3.0)
    assert torch.equal(
        one.generate(PROMPT, **options), model.generate(PROMPT, one.memory, **options)[:, 9:]
    )


def test_copies_of_the_layers_for_other_devices_are_refused_where_they_would_read_nothing(
    model, memories
):
    layer = model.layers[0]
    assert type(layer._replicate_for_data_parallel()) is type(layer)
    with model.using(memories[0]), pytest.raises(ValueError, match="DataParallel"):
        layer._replicate_for_data_parallel()
