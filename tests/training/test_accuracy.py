"""Accuracy by token and by sequence, against counting by hand."""

import torch
from torch.nn import functional as F

from lkda.models.build import build_model
from lkda.training.accuracy import SubsetMetrics, columns
from lkda.training.losses import ModelLoss, next_token_loss


def small():
    torch.manual_seed(0)
    mixer = {"pattern": ["conv"], "num_heads": 1}
    return build_model({"vocab_size": 5, "d_model": 8, "num_layers": 1, "mixer": mixer})


def batch(subset, *, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = (torch.randint(5, (rows, 12), generator=generator) for _ in range(2))
    targets[torch.rand(rows, 12, generator=generator) < 0.97] = -100
    targets[:, 3] = 1  # something is asked of every sequence
    target_positions = (targets.flatten() != -100).nonzero().flatten()
    return {
        "tokens": tokens,
        "targets": targets,
        "cu_seqlens": None,
        "target_positions": target_positions,
        "subset": subset,
    }


def test_it_counts_what_is_asked_part_by_part():
    model = small()
    subsets = [{"length": 12, "pairs": 1, "examples": 3}, {"length": 12, "pairs": 2, "examples": 3}]
    metrics = SubsetMetrics(subsets, vocab_size=5)
    batches = [batch(0, rows=40, seed=1), batch(1, rows=30, seed=2), batch(0, rows=7, seed=3)]
    with torch.inference_mode():
        for each in batches:
            metrics.measure(model, each)
        found = metrics.compute()
        for n, name in ((0, "length_12_pairs_1"), (1, "length_12_pairs_2")):
            logits = torch.cat([model(each["tokens"]) for each in batches if each["subset"] == n])
            targets = torch.cat([each["targets"] for each in batches if each["subset"] == n])
            right = (logits.argmax(-1) == targets)[targets != -100].float().mean()
            whole = ((logits.argmax(-1) == targets) | (targets == -100)).all(1).float().mean()
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
            assert 0 < whole < right < 1
            torch.testing.assert_close(found[f"val/accuracy/{name}"], right)
            torch.testing.assert_close(found[f"val/sequence_accuracy/{name}"], whole)
            torch.testing.assert_close(found[f"val/loss/{name}"], loss)
    both = [found[f"val/accuracy/length_12_pairs_{n}"] for n in (1, 2)]
    torch.testing.assert_close(found["val/accuracy"], sum(both) / 2)
    assert set(columns(subsets)) | {"val/loss"} == set(found)


def test_a_part_that_was_not_seen_has_no_numbers():
    metrics = SubsetMetrics([{"length": 12}, {"length": 24}], vocab_size=5)
    for subset, length, other in ((0, "12", "24"), (1, "24", "12")):  # each computation begins anew
        metrics.measure(small(), batch(subset, rows=4, seed=1))
        found = metrics.compute()
        assert any(length in name for name in found)
        assert not any(other in name for name in found)


def test_the_loss_is_computed_at_the_target_positions():
    model, each = small(), batch(0, rows=4, seed=1)
    want = next_token_loss(model(each["tokens"]), each["targets"])
    positions = each["target_positions"]
    got = ModelLoss(model).mean(each["tokens"], each["targets"], target_positions=positions)
    torch.testing.assert_close(got, want)
