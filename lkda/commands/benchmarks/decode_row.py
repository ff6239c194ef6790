"""Measures decoding of one model, in a process of its own, which `decode_benchmark` starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from lkda.bench.decode import decode_row, peer_row, prefill_row
from lkda.bench.op_benchmark import DTYPES
from lkda.commands.benchmarks.decode_case import LKDA, PREFILL, DecodeCase
from lkda.commands.benchmarks.peers import check_available
from lkda.commands.benchmarks.row_process import answer
from lkda.commands.run.fit import quiet_libraries
from lkda.commands.run.prepared_run import model_of, prepare_data, with_data
from lkda.commands.run.run_setup import plan_run
from lkda.models.decoder import Sampling
from lkda.models.lm import LanguageModel
from lkda.models.stepwise import set_state_dtype
from lkda.shipped import CONFIGS


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """The measurements of a case; see `lkda.bench.decode`.

    Args:
        request: {"case": of a DecodeCase, "device"}.
    Raises: InputError for a peer that cannot run.
    """
    quiet_libraries()
    case, device = DecodeCase(**request["case"]), torch.device(request["device"])
    if case.implementation == "fla":
        check_available("fla_kda", device)
    model = model_of_case(case, device)
    if case.implementation == LKDA:
        sampling = Sampling(0.0) if case.top_p is None else Sampling(1.0, top_p=case.top_p)
        row = decode_row(model, case.batch, case.context, sampling)
    elif case.implementation == PREFILL:
        row = prefill_row(model, case.context)
    else:
        row = peer_row(model, case.implementation, case.batch, case.context)
    return row


def model_of_case(case: DecodeCase, device: torch.device) -> LanguageModel:
    """The model with random weights."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        plan = plan_run(compose("train", overrides=case.train_overrides(device)), Path("."))
    model = model_of(with_data(plan, prepare_data(plan, None), None)).to(device, DTYPES[case.dtype]).eval()
    if case.state_dtype is not None:
        set_state_dtype(model, case.state_dtype)
    return model


def main(arguments: Sequence[str]) -> None:
    answer(measure, arguments)
