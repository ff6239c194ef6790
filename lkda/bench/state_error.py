"""How the error of KDA's state grows while decoding, for each dtype of the state, against float64 on a CPU.

    python -m lkda.bench.state_error --out docs/results/kda_state_dtypes
    python -m lkda.bench.state_error --out docs/results/kda_state_dtypes_rare --rare --head-dim 32 --sequences 1

Each takes several minutes and writes errors.json; `lkda.report.redraw` makes a table and a plot from it.

Keys and queries are random unit vectors, values are N(0, 1), and beta = sigmoid(N(0, 1)). Every token and channel has
the same decay. With --rare only every 100th token writes and beta is 0 otherwise, as in a model that keeps its state.
Each state is stored in its dtype from the first token on. The arithmetic of a step is float32, as in the kernel.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from lkda.bench.files import write_json
from lkda.ops.kda.reference.recurrent import kda_step_recurrent
from lkda.ops.kda.state import STATE_DTYPES, pack_state, unpack_state

DECAYS = (1e-1, 1e-2, 1e-3, 1e-4, 0.0)  # nats per token
STEPS = 10_000
RARE = 100  # tokens between two writes with --rare
WINDOW = 50  # tokens over which the error of o is averaged


def error_growth(steps: int, sequences: int, head_dim: int, *, rare: bool) -> list[dict[str, Any]]:
    """Rows: state_dtype, decay, step, relative L2 errors of o (over the last WINDOW tokens) and of the state."""
    torch.manual_seed(0)
    B, H, D = sequences, len(DECAYS), head_dim
    g = -torch.tensor(DECAYS, dtype=torch.float64).view(1, H, 1).expand(B, H, D)
    truth = torch.zeros(B, H, D, D, dtype=torch.float64)
    states = {name: truth.float() for name in STATE_DTYPES}
    wrong = {name: torch.zeros(H, dtype=torch.float64) for name in STATE_DTYPES}
    right = torch.zeros(H, dtype=torch.float64)
    measured_at = {int(x) for x in torch.logspace(2, 4, 9).round()} | {steps}
    rows = []
    for step in track(range(1, steps + 1), "error growth"):
        q, k = torch.nn.functional.normalize(torch.randn(2, B, H, D, dtype=torch.float64), dim=-1)
        v, beta = torch.randn(B, H, D, dtype=torch.float64), torch.sigmoid(torch.randn(B, H, dtype=torch.float64))
        if rare and step % RARE != 1:
            beta.zero_()
        inputs = [x.float() for x in (q, k, v, g, beta)]
        q, k, v, _, beta = (x.double() for x in inputs)
        want, truth = kda_step_recurrent(q, k, v, g, beta, truth, D**-0.5)
        if step % WINDOW == 1:
            right.zero_()
            for sums in wrong.values():
                sums.zero_()
        right += want.square().sum((0, 2))
        for name, dtype in STATE_DTYPES.items():
            o, state = kda_step_recurrent(*inputs, states[name], D**-0.5)  # type: ignore[call-arg, arg-type]
            states[name] = unpack_state(pack_state(state, dtype))
            wrong[name] += (o - want).square().sum((0, 2))
        if min(abs(step - x) for x in measured_at) < WINDOW and step % WINDOW == 0:
            for name in STATE_DTYPES:
                of_o = (wrong[name] / right).sqrt().tolist()
                of_state = ((states[name] - truth).square().sum((0, 2, 3)) / truth.square().sum((0, 2, 3))).sqrt()
                rows += [
                    {"state_dtype": name, "decay": decay, "step": step, "error_o": x, "error_state": y}
                    for decay, x, y in zip(DECAYS, of_o, of_state.tolist())
                ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/state_error"), help="directory of the results")
    parser.add_argument("--steps", type=int, default=STEPS, help="tokens of a sequence")
    parser.add_argument("--sequences", type=int, default=4, help="sequences over which the errors are averaged")
    parser.add_argument("--head-dim", type=int, default=64, help="channels of a head")
    parser.add_argument("--rare", action="store_true", help=f"only every {RARE}th token writes")
    options = parser.parse_args()
    rows = error_growth(options.steps, options.sequences, options.head_dim, rare=options.rare)
    header = {"device": "cpu", "torch": torch.__version__, "sequences": options.sequences}
    header |= {"head_dim": options.head_dim, "rare": options.rare}
    write_json(options.out / "errors.json", {"kind": "state_error", "header": header, "rows": rows})
    last = max(row["step"] for row in rows)
    for dtype in STATE_DTYPES:
        ends = [row["error_o"] for row in rows if (row["state_dtype"], row["step"]) == (dtype, last)]
        print(f"{dtype:10s}", *(f"{error:.1e}" for error in ends))


if __name__ == "__main__":
    main()
