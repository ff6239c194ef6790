"""What the tasks promise, seen in what they sample."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lkda.data.datamodule import CountUp
from lkda.data.synthetic.mqar import MQAR
from lkda.data.synthetic.mqar_answered import AnsweredMQAR
from lkda.data.synthetic.mqar_kimi import ConsecutiveMQAR
from lkda.data.synthetic.palindrome import Palindrome
from lkda.data.synthetic.sampling import distinct, weighted
from lkda.data.synthetic.stack import POP, PUSH, STACKS_FROM, Stack
from lkda.targets import IGNORE_INDEX

SHAPES = [(64, 4), (64, 16), (128, 32), (256, 64), (1024, 256)]
MIXTURE = [{"length": 64, "pairs": 4, "examples": 96}, {"length": 128, "pairs": 8, "examples": 32}]


def mqar(**changes):
    options = {"train": MIXTURE, "validation": [{"length": 64, "pairs": 4, "examples": 40}], "batch_size": 16}
    return MQAR(**{**options, **changes})


TASKS = {
    "mqar": mqar,
    "palindrome": lambda **changes: Palindrome(**{"context": 64, "batch_size": 4, **changes}),
    "mqar_kimi": lambda **changes: ConsecutiveMQAR(**{"context": 64, "batch_size": 4, **changes}),
    "mqar_answered": lambda **changes: AnsweredMQAR(**{"context": 64, "batch_size": 4, **changes}),
    "stack": lambda **changes: Stack(**{"context": 64, "batch_size": 4, **changes}),
}


def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize(("length", "pairs"), SHAPES)
def test_mqar_asks_every_key_once_and_labels_its_value(length, pairs):
    tokens, targets = mqar().sample(64, rng(), length=length, pairs=pairs)
    keys, values = tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2]
    assert keys.min() >= 1
    assert keys.max() < 4096 <= values.min()
    assert values.max() < 8192
    for row, asks, k, v in zip(tokens, targets, keys, values):
        assert len(set(k)) == len(set(v)) == pairs
        places = np.flatnonzero(asks != IGNORE_INDEX)
        assert len(places) == pairs
        assert places.min() >= 2 * pairs
        assert not (places % 2).any()
        assert set(row[places]) == set(k)
        value_of = dict(zip(k, v))
        assert all(value_of[row[place]] == asks[place] for place in places)


def test_mqar_asks_in_a_random_order_at_places_of_the_stated_law():
    """The place of a single pair's query: chi-squared against p(g) ~ g^(a - 1), 30 degrees of freedom."""
    _, targets = mqar().sample(50_000, rng(), length=64, pairs=1)
    counts = np.bincount((np.nonzero(targets != IGNORE_INDEX)[1] - 2) // 2, minlength=31)
    law = np.arange(1, 32) ** (0.01 - 1)
    expected = law / law.sum() * counts.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 30 + 5 * 60**0.5
    tokens, targets = mqar().sample(2000, rng(), length=64, pairs=2)
    first = np.argmax(targets != IGNORE_INDEX, axis=1)
    assert 0.45 < (tokens[np.arange(2000), first] == tokens[:, 0]).mean() < 0.55


def test_mqar_is_noise_where_nothing_is_said_or_asked():
    tokens, targets = mqar().sample(500, rng(), length=64, pairs=4)
    noise = tokens[:, 8:][targets[:, 8:] == IGNORE_INDEX]
    assert noise.min() < 50
    assert noise.max() > 8140
    assert abs(noise.mean() - 4095.5) < 50


def test_drawing_without_replacement():
    """Every ordered pair of 4 numbers equally often; and weights 3 : 1 : 1 come first in 3 of 5."""
    sampled = distinct(rng(), 24_000, 2, low=5, high=9)
    counts = np.bincount((sampled[:, 0] - 5) * 4 + sampled[:, 1] - 5, minlength=16).reshape(4, 4)
    assert (np.diag(counts) == 0).all()
    assert abs(counts[~np.eye(4, dtype=bool)] - 2000).max() < 5 * 2000**0.5
    assert np.array_equal(np.sort(distinct(rng(), 3, 50, low=0, high=50)), np.tile(np.arange(50), (3, 1)))
    order = weighted(rng(), 10_000, 3, np.array([3.0, 1.0, 1.0]))
    assert np.array_equal(np.sort(order), np.tile(np.arange(3), (10_000, 1)))
    assert abs((order[:, 0] == 0).mean() - 0.6) < 0.02
    assert abs((order[order[:, 0] == 1, 1] == 0).mean() - 0.75) < 0.04


def test_palindrome():
    tokens, targets = Palindrome(context=32).sample(50, rng(), length=32)
    string = tokens[:, :16]
    assert string.min() >= 1
    assert string.max() <= 64
    assert (tokens[:, 16] == 0).all()
    assert (targets[:, :16] == IGNORE_INDEX).all()
    assert (targets[:, 16:] == string[:, ::-1]).all()
    assert (tokens[:, 17:] == targets[:, 16:-1]).all()


@pytest.mark.parametrize("length", [64, 65, 66, 4])
def test_mqar_kimi_asks_one_query_after_another(length):
    tokens, targets = ConsecutiveMQAR(context=length).sample(50, rng(), length=length)
    pairs = (length - 1) // 3
    assert tokens.shape == targets.shape == (50, length)
    keys, values = tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2]
    assert (tokens[:, 2 * pairs : -pairs] == 0).all()
    assert keys.min() >= 1
    assert keys.max() < 4096 <= values.min()
    for row, asks, k, v in zip(tokens, targets, keys, values):
        value_of = dict(zip(k, v))
        assert len(value_of) == pairs
        assert sorted(row[-pairs:]) == sorted(k)
        assert [value_of[key] for key in row[-pairs:]] == list(asks[-pairs:])
    assert pairs == 1 or (tokens[:, -pairs:] != keys).any(1).all()
    assert (targets[:, :-pairs] == IGNORE_INDEX).all()


def test_mqar_answered():
    tokens, targets = AnsweredMQAR(context=64).sample(50, rng(), length=64)
    keys, values = tokens[:, 0:32:2], tokens[:, 1:32:2]
    assert (tokens[:, 32] == 0).all()
    assert keys.min() >= 1
    assert keys.max() < 4096 <= values.min()
    for row, asks, k, v in zip(tokens, targets, keys, values):
        value_of = dict(zip(k, v))
        assert len(value_of) == 16
        assert list(row[33::2]) != list(k)
        assert sorted(row[33::2]) == sorted(k)
        assert [value_of[key] for key in row[33::2]] == list(asks[33::2])
        assert list(row[34::2]) == list(asks[33:-1:2])
    assert (np.delete(targets, np.s_[33::2], axis=1) == IGNORE_INDEX).all()


def test_stack_pops_what_was_pushed_last():
    data = Stack(context=300, stacks=8, elements=50)
    tokens, targets = data.sample(40, rng(), length=300)
    pops = 0
    for row, asks in zip(tokens.reshape(40, 100, 3), targets.reshape(40, 100, 3)):
        stacks = {STACKS_FROM + n: [] for n in range(8)}
        assert (asks[:, [0, 2]] == IGNORE_INDEX).all()
        for (what, stack, element), asked in zip(row, asks[:, 1]):
            assert STACKS_FROM + 8 <= element < data.vocab_size
            if what == PUSH:
                assert asked == IGNORE_INDEX
                stacks[stack].append(element)
            else:
                assert what == POP
                assert stacks[stack].pop() == element == asked
                pops += 1
    assert 0.4 < pops / 4000 < 0.5  # half of the operations, but for the empty beginnings


@pytest.mark.parametrize("task", TASKS)
def test_batches_follow_from_the_seed_and_their_number(task):
    one, same, other = (TASKS[task](seed=seed).training_batches(rank=0, world_size=1) for seed in (1, 1, 2))
    for n in (0, 1, 40):
        assert torch.equal(one[n]["tokens"], same[n]["tokens"])
        assert not np.array_equal(one[n]["tokens"], other[n]["tokens"])
    seen = {one[n]["tokens"].numpy().tobytes() for n in range(30)}
    assert len(seen) == 30
    elsewhere = TASKS[task](seed=1).training_batches(rank=1, world_size=2)
    assert not torch.equal(one[0]["tokens"], elsewhere[0]["tokens"])


@pytest.mark.parametrize("task", TASKS)
def test_batches_do_not_depend_on_the_workers(task):
    batches = TASKS[task]().training_batches(rank=0, world_size=1)
    loader = iter(DataLoader(CountUp(batches, 3), batch_size=None, num_workers=2))
    for n in range(3, 9):
        got, want = next(loader), batches[n]
        assert got["subset"] == want["subset"]
        assert got["cu_seqlens"] is None
        assert all(torch.equal(got[key], want[key]) for key in ("tokens", "targets", "target_positions"))


@pytest.mark.parametrize("task", TASKS)
def test_asked_are_the_places_of_the_targets(task):
    batch = TASKS[task]().training_batches(rank=0, world_size=1)[0]
    flat, positions = batch["targets"].flatten(), batch["target_positions"]
    targets = flat[positions] != IGNORE_INDEX
    assert torch.equal(positions[targets], (flat != IGNORE_INDEX).nonzero().flatten())
    assert targets.any()
    assert batch["tokens"].max() < TASKS[task]().vocab_size


@pytest.mark.parametrize("task", TASKS)
def test_few_shapes_and_so_few_cuda_graphs(task):
    batches = TASKS[task](batch_size=32).training_batches(rank=0, world_size=1)
    examples = [batches[n] for n in range(60)]
    assert len({(x["tokens"].shape, x["target_positions"].shape) for x in examples}) <= 6
    assert all(len(x["target_positions"]) <= x["targets"].numel() for x in examples)


def test_positions_without_a_target_change_no_loss():
    batch = Stack(context=64, batch_size=4).training_batches(rank=0, world_size=1)[0]
    flat, positions = batch["targets"].flatten(), batch["target_positions"]
    logits = torch.randn(len(flat), 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = torch.nn.functional.cross_entropy(logits[positions], flat[positions])
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits, flat))
    assert (flat[positions] == IGNORE_INDEX).any()


def test_an_epoch_holds_every_part_as_often_as_it_says():
    data = mqar()
    batches = data.training_batches(rank=0, world_size=1)
    for epoch in range(3):
        subsets = [batches[n]["subset"] for n in range(8 * epoch, 8 * epoch + 8)]
        assert sorted(subsets) == [0] * 6 + [1] * 2
    assert data.tokens_per_batch == 16 * (6 * 64 + 2 * 128) // 8
    assert data.context == 128
    assert data.source == "mqar"


def test_examples_come_again_where_that_is_asked_for():
    def epoch(data, number):
        batches = data.training_batches(rank=0, world_size=1)
        return [batches[n]["tokens"].numpy().tobytes() for n in range(8 * number, 8 * number + 8)]

    again = mqar(fresh=False)
    assert sorted(epoch(again, 0)) == sorted(epoch(again, 3))
    assert epoch(again, 0) != epoch(again, 3)
    assert not set(epoch(mqar(), 0)) & set(epoch(mqar(), 3))


def test_validation_is_the_same_for_every_seed_and_unlike_training():
    one, other = (mqar(seed=seed).validation_batches() for seed in (1, 2))
    assert [len(one[n]["tokens"]) for n in range(len(one))] == [16, 16, 8]
    assert all(torch.equal(one[n]["tokens"], other[n]["tokens"]) for n in range(3))
    assert not torch.equal(one[0]["tokens"], one[1]["tokens"])
    with pytest.raises(IndexError):
        one[3]


def test_validation_batches_follow_subset_by_subset():
    """The last of a subset has what is left. A large number of examples takes no time and no memory."""
    part, large = MIXTURE[0], {**MIXTURE[1], "examples": 2 * 10**9}
    data = mqar(validation=[{**part, "examples": 40}, {**MIXTURE[1], "examples": 5}, large | {"length": 256}])
    batches = data.validation_batches()
    found = [batches[n] for n in range(5)]
    assert [(x["subset"], *x["tokens"].shape) for x in found[:4]] == [(0, 16, 64), (0, 16, 64), (0, 8, 64), (1, 5, 128)]
    assert (found[4]["subset"], len(batches)) == (2, 4 + 125 * 10**6)
    expected = data.batch(data.val_subsets[0], 0, 8, 1, 0, 32)
    assert torch.equal(found[2]["tokens"], expected["tokens"])
    assert [len(data.measured_subsets(limit)) for limit in (1, 3, 4, 5, None, 1e-8, 0.5)] == [1, 1, 2, 3, 3, 1, 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mqar(train=[{"length": 64, "pairs": 17, "examples": 1}]), "got length 64 and 17 pairs: .* at most 16"),
        (lambda: mqar(vocab_size=8), "samples 4 different keys from .1, 4.: set data.vocab_size to 10 or more"),
        (
            lambda: mqar(train=[{"length": 64, "examples": 1}]),
            "a subset of data.train must have the entries length, pairs, examples; pairs is missing in .'length': 64, ",
        ),
        (
            lambda: mqar(validation=[{"pairs": 4, "exmples": 1}]),
            "data.validation must have .*; length is missing, examples is missing, exmples is none of them in",
        ),
        (
            lambda: mqar(train=[{**MIXTURE[0], "pears": 4}]),
            "must have the entries length, pairs, examples; pears is none of them in",
        ),
        (
            lambda: mqar(validation=[{"pairs": 4, "length": 64, "examples": 2}, MIXTURE[0]]),
            "data.validation has a subset of length 64, pairs 4 twice: leave one of them out",
        ),
        (lambda: Stack(val_lengths=[64, 32, 64]), "data.val_lengths has 64 twice: leave one of them out"),
        (lambda: Palindrome(val_lengths=[]), "data.val_lengths is empty: give some lengths, or leave it out"),
        (lambda: Palindrome(val_lengths=[0]), "data.val_lengths must be a whole number of 1 or more, got 0"),
        (lambda: Palindrome(context=0), "data.context must be a whole number of 1 or more, got 0"),
        (lambda: Palindrome(val_examples=0), "data.val_examples must be a whole number of 1 or more, got 0"),
        (lambda: mqar(train=[]), "need at least one subset"),
        (lambda: mqar(batch_size=0), "data.batch_size must be a whole number of 1 or more, got 0"),
        (lambda: Palindrome(context=33), "needs an even length, got 33: change data.context"),
        (lambda: AnsweredMQAR(context=30), "a multiple of 4 tokens, got 30"),
        (lambda: AnsweredMQAR(context=64, vocab_size=16), "16 different keys, which do not fit"),
        (lambda: ConsecutiveMQAR(context=3), "a length of 4 tokens or more .*, got 3"),
        (
            lambda: ConsecutiveMQAR(context=64, vocab_size=32),
            "21 different keys, which do not fit into .1, 16.: set .* 44",
        ),
        (lambda: Stack(context=5), "a length of 6 tokens or more .*, got 5"),
        (lambda: mqar(train=[5]), "a subset of data.train must be like .length: 64, examples: 1000., got 5"),
        (lambda: Stack(stacks=0), "data.stacks must be a whole number of 1 or more, got 0"),
        (lambda: Palindrome(letters=0), "data.letters must be a whole number of 1 or more, got 0"),
        (lambda: Stack(pop=1.0), "data.pop must be between 0 and 1, got 1.0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_drawing_is_fast_enough():
    """A batch of 256 of the training mixture's largest subset within 100 ms; it takes about 2."""
    data, generator = mqar(), rng()
    data.sample(256, generator, length=256, pairs=64)
    begin = time.process_time()
    data.sample(256, generator, length=256, pairs=64)
    assert time.process_time() - begin < 0.1
