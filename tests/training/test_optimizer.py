"""Which parameters decay, and what the learning rate does."""

import copy
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lkda.models.build import build_model
from lkda.models.mixers import mixer_names
from lkda.training.old_checkpoint import current_optimizer_state
from lkda.training.optimizer import build_optimizer, check_schedule, learning_rate_factor
from lkda.training.parameters import parameter_groups
from tests.commands.ranks import on_ranks

SCALE = {"matrix": 1.0, "embedding": 1.0, "head": 1.0, "vector": 1.0}
ADAMW = {"name": "adamw", "lr": 1e-3, "lr_scale": SCALE, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
MUON = {**ADAMW, "name": "muon", "momentum": 0.95}
COSINE = {"name": "cosine", "warmup_steps": 10, "min_lr_ratio": 0.1}
WSD = {"name": "wsd", "warmup_steps": 10, "decay_fraction": 0.5, "min_lr_ratio": 0.0}


def tiny(mixer: str, *, tie_embeddings: bool = True) -> torch.nn.Module:
    config = {"vocab_size": 16, "d_model": 8, "num_layers": 2, "mlp_hidden": 12, "tie_embeddings": tie_embeddings}
    return build_model({**config, "mixer": {"pattern": [mixer], "num_heads": 2}})


@pytest.mark.parametrize("mixer", mixer_names())
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_matrices_alone_decay(mixer: str, tie_embeddings: bool) -> None:
    model = tiny(mixer, tie_embeddings=tie_embeddings)
    groups = parameter_groups(model, lr=1.0, lr_scale=SCALE, weight_decay=0.1)
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(names)  # each once
    exempt_words = ("norm", "conv", "A_log", "bias", "embed")
    for number, name in names.items():
        assert decay[number] == (0.0 if any(word in name for word in exempt_words) else 0.1), name


def test_each_kind_of_parameter_has_its_learning_rate() -> None:
    model = tiny("kda", tie_embeddings=False)
    optimizer = build_optimizer(model, {**ADAMW, "lr_scale": {**SCALE, "embedding": 3.0, "vector": 0.5}})
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert rates[id(named["embed_tokens.weight"])] == pytest.approx(3e-3)
    assert rates[id(named["lm_head.weight"])] == pytest.approx(1e-3)
    assert rates[id(named["blocks.0.mixer.q_proj.weight"])] == pytest.approx(1e-3)
    assert rates[id(named["blocks.0.mixer.A_log"])] == pytest.approx(5e-4)
    assert optimizer.param_groups[0]["kind"] == "matrix"  # whose rate is the one that is logged


def test_weight_decay_reaches_the_optimizer() -> None:
    optimizer = build_optimizer(tiny("kda"), ADAMW)
    assert [(g["kind"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("matrix", 0.1),
        ("embedding", 0.0),
        ("vector", 0.0),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "sgd"}, "optimizer.name must be one of adamw, muon, got 'sgd'"),
        ({"lr": 0.0}, "optimizer.lr must be greater than 0"),
        ({"lr": float("nan")}, "optimizer.lr must be greater than 0"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay must be 0 or more"),
        ({"betas": [0.9, 1.0]}, "optimizer.betas must be two numbers in"),
        (
            {"lr_scale": {**SCALE, "table": 3.0}},
            "optimizer.lr_scale must be a number for each of matrix, embedding, head, vector, got",
        ),
        ({"lr_scale": {**SCALE, "embedding": 0}}, "optimizer.lr_scale.embedding must be greater than 0, got 0"),
    ],
)
def test_bad_optimizers_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_optimizer(tiny("kda"), {**ADAMW, **change})


@pytest.mark.parametrize("mixer", mixer_names())
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_muon_trains_hidden_matrices_and_adamw_the_rest(mixer: str, tie_embeddings: bool) -> None:
    model = tiny(mixer, tie_embeddings=tie_embeddings)
    optimizer = build_optimizer(model, MUON)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(id(p) for group in optimizer.param_groups for p in group["params"]) == sorted(names)  # each once
    of_muon = {names[id(p)] for p in optimizer.param_groups[0]["params"]}
    outer = ("norm", "conv", "A_log", "bias", "embed", "lm_head")
    for name, parameter in model.named_parameters():
        assert (name in of_muon) == (parameter.ndim == 2 and not any(word in name for word in outer)), name


def losses(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    tokens, found = torch.arange(32).view(2, 16) % 16, []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_muon_learns_and_its_learning_rate_is_one_number() -> None:
    torch.manual_seed(0)
    model = tiny("kda")
    optimizer = build_optimizer(model, {**MUON, "lr": 1e-2})
    found = losses(model, optimizer, 30)
    assert found[-1] < 0.5 * found[0]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = [p.clone() for p in model.parameters()]
    losses(model, optimizer, 1)
    assert schedule.get_last_lr() == [0.0] * len(optimizer.param_groups)
    assert all(torch.equal(x, y) for x, y in zip(before, model.parameters()))


def test_muon_goes_on_from_its_state_as_if_it_had_not_stopped() -> None:
    torch.manual_seed(0)
    model = tiny("kda")
    optimizer = build_optimizer(model, MUON)
    losses(model, optimizer, 3)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    want = losses(model, optimizer, 3)
    again = tiny("kda")
    again.load_state_dict(weights)
    resumed = build_optimizer(again, MUON)
    resumed.load_state_dict(saved)
    assert losses(again, resumed, 3) == want


@pytest.mark.long
def test_muon_on_more_devices_than_a_matrix_has_rows(tmp_path: Path) -> None:
    """The projections to the heads' write strengths have 2 rows. Three devices share them and all other weights."""

    def trained(rank: int, count: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = tiny("kda")
        if count > 1:
            torch.distributed.init_process_group("gloo", rank=rank, world_size=count)
            fully_shard(model, mesh=init_device_mesh("cpu", (count,)))
        optimizer = build_optimizer(model, MUON)
        drawn = torch.Generator().manual_seed(1)
        for _ in range(2):
            for parameter in model.parameters():
                gradient = torch.randn(parameter.shape, generator=drawn)
                parameter.grad = (
                    distribute_tensor(gradient, parameter.device_mesh, [Shard(0)]) if count > 1 else gradient
                )
            optimizer.step()
        found = model.state_dict()
        states = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
        momenta = {f"{name}.momentum": x["momentum_buffer"] for name, x in states.items() if "momentum_buffer" in x}
        return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in {**found, **momenta}.items()}

    (expected,) = on_ranks(1, lambda rank: trained(rank, 1), tmp_path / "one")
    few = [name for name, tensor in expected.items() if tensor.ndim == 2 and len(tensor) == 2]
    assert len(few) == 4  # two matrices and their momenta
    for found in on_ranks(3, lambda rank: trained(rank, 3), tmp_path / "three"):
        assert found.keys() == expected.keys()
        for name in few:  # those of the other matrices are torch's, whose sums in bf16 have another order
            torch.testing.assert_close(found[name], expected[name], msg=name)


def test_muon_without_a_torch_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match=r"needs torch 2\.9 or later"):
        build_optimizer(tiny("kda"), MUON)


def test_cosine_warms_up_and_ends_at_its_floor() -> None:
    factors = [learning_rate_factor(COSINE, step=step, total_steps=110) for step in range(111)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(0.55)
    assert factors[110] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_wsd_holds_and_comes_down_in_a_line() -> None:
    factors = [learning_rate_factor(WSD, step=step, total_steps=100) for step in range(101)]
    assert set(factors[10:50]) == {1.0}
    assert factors[75] == pytest.approx(0.5)
    assert factors[100] == 0.0


def test_constant_holds() -> None:
    constant = {"name": "constant", "warmup_steps": 0}
    assert {learning_rate_factor(constant, step=step, total_steps=9) for step in range(10)} == {1.0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**COSINE, "name": "linear"}, "scheduler.name must be one of constant, cosine, wsd, got 'linear'"),
        ({**COSINE, "warmup_steps": -1}, "warmup_steps must be a whole number of 0 or more, got -1"),
        ({**COSINE, "min_lr_ratio": 1.5}, r"scheduler.min_lr_ratio must be in \[0, 1\]"),
        ({**WSD, "decay_fraction": 0.0}, r"scheduler.decay_fraction must be in \(0, 1\]"),
    ],
)
def test_bad_schedules_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_schedule(config)


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
def test_a_state_of_the_old_groups_goes_on(config: dict[str, object], tie_embeddings: bool) -> None:
    """Two groups, decayed and not, in the order of the model's parameters, as they were saved once."""
    torch.manual_seed(0)
    model = tiny("kda", tie_embeddings=tie_embeddings)
    optimizer = build_optimizer(model, config)
    losses(model, optimizer, 3)
    weights, saved = copy.deepcopy(model.state_dict()), old_groups(model, optimizer)
    want = losses(model, optimizer, 3)
    again = tiny("kda", tie_embeddings=tie_embeddings)
    again.load_state_dict(weights)
    resumed = build_optimizer(again, config)
    resumed.load_state_dict(current_optimizer_state(saved, again))
    assert losses(again, resumed, 3) == want


def old_groups(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    parameters = list(model.parameters())
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    kinds = [["matrix"], ["head"], ["embedding", "vector"]]
    if "momentum" not in optimizer.param_groups[0]:
        kinds = [["matrix", "head"], ["embedding", "vector"]]
    groups, state, count = [], {}, 0
    for chosen in kinds:
        members = [p for p in parameters if of[id(p)]["kind"] in chosen]
        if not members:
            continue
        options = {k: v for k, v in of[id(members[0])].items() if k not in ("params", "kind", "lr_scale")}
        groups.append({**options, "params": list(range(count, count + len(members)))})
        state |= {count + n: copy.deepcopy(optimizer.state[p]) for n, p in enumerate(members)}
        count += len(members)
    return {"state": state, "param_groups": groups}
