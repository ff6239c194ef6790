"""Muon for the hidden matrices and AdamW for all other parameters, as one optimizer (arXiv:2502.16982)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lkda.training.parameters import parameter_groups
from lkda.training.sharded_checkpoint import rows_of


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon and AdamW with one list of groups and one state, so that schedules, clipping and checkpoints handle
    a single optimizer. Like torch's fused AdamW, it skips a step if its attribute `found_inf`, a scalar on the device,
    is not zero.

    Args:
        matrices: the group that Muon trains. All its parameters have two dimensions.
        rest: the groups that AdamW trains.
        lr: of both. Muon's is multiplied by 0.2 sqrt(max(rows, columns)), which matches the root-mean-square step of
            AdamW.
        momentum: Nesterov momentum of Muon.
        weight_decay: of Muon.
        betas, eps: of AdamW.
    """

    def __init__(
        self,
        matrices: dict[str, Any],
        rest: list[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        scale: Literal["match_rms_adamw"] = "match_rms_adamw"
        self.muon = torch.optim.Muon(
            [matrices], lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn=scale
        )
        self.adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, fused=True)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Make both optimizers use this optimizer's groups and state instead of their own."""
        count = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        self.muon.state = self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        self.adamw.found_inf = found_inf  # type: ignore[attr-defined]
        if found_inf is None:
            self._muon_step()
        else:
            self._muon_step_unless(found_inf.bool())
        self.adamw.step()
        return loss

    def _muon_step(self) -> None:
        """Muon's step. If devices share the weights, torch cannot add the update to a matrix that has fewer rows than
        there are devices; that of such a matrix, which is small, is computed on every device."""
        (group,) = self.muon.param_groups
        parameters = group["params"]
        few = [parameter for parameter in parameters if _has_few_rows(parameter) and parameter.grad is not None]
        group["params"] = [parameter for parameter in parameters if not _has_few_rows(parameter)]
        self.muon.step()
        group["params"] = parameters
        for parameter in few:
            self._step_of_whole(parameter, group)

    def _step_of_whole(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        """The step of a shared matrix, computed with all its rows. Each device keeps its own."""
        gradient = parameter.grad
        assert isinstance(parameter, DTensor)
        assert isinstance(gradient, DTensor)
        momentum = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(gradient))
        whole = nn.Parameter(parameter.full_tensor())
        whole.grad = gradient.full_tensor()
        muon = torch.optim.Muon([{**group, "params": [whole]}])
        muon.state[whole]["momentum_buffer"] = momentum.full_tensor()
        muon.step()
        for shared, new in ((parameter, whole.detach()), (momentum, muon.state[whole]["momentum_buffer"])):
            first, last = rows_of(len(new), shared.device_mesh.get_local_rank(), shared.device_mesh.size())
            shared.to_local().copy_(new[first:last])

    def _muon_step_unless(self, skip: Tensor) -> None:
        """Muon's step, which has no effect if `skip`, a scalar on the device, is true. torch's Muon has no such
        argument, as its AdamW has. The matrices and their momenta are therefore copied and put back."""
        kept = []
        for parameter in self.muon.param_groups[0]["params"]:
            if parameter.grad is not None:
                momentum = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter.grad))
                kept += [(parameter, parameter.clone()), (momentum, momentum.clone())]
        self.muon.step()
        for tensor, before in kept:
            tensor.copy_(torch.where(skip, before, tensor))


def _has_few_rows(parameter: Tensor) -> bool:
    """Whether some of the devices that share a matrix have no row of it."""
    return isinstance(parameter, DTensor) and len(parameter) < parameter.device_mesh.size()


def muon(model: nn.Module, config: Mapping[str, Any]) -> MuonWithAdamW:
    """Muon for the matrices of linear layers between the embedding and the head; AdamW for embeddings, the head, norms,
    convolutions, A_log, dt_bias and other biases. Weight decay acts on the matrices of linear layers, and on a head
    with a weight of its own.

    Args:
        model: the model to train. Its output layer, if it has one, is `lm_head`.
        config: {"lr", "lr_scale", "momentum", "weight_decay", "betas", "eps"}.
    """
    groups = parameter_groups(model, lr=config["lr"], lr_scale=config["lr_scale"], weight_decay=config["weight_decay"])
    (matrices,) = (group for group in groups if group["kind"] == "matrix")
    return MuonWithAdamW(
        matrices,
        [group for group in groups if group["kind"] != "matrix"],
        lr=config["lr"],
        momentum=config["momentum"],
        weight_decay=config["weight_decay"],
        betas=tuple(config["betas"]),
        eps=config["eps"],
    )
