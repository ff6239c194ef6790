"""Draws results.json of `lkda.commands.studies.peer_training`: table.json, and a plot of losses and differences."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lkda.checks import InputError
from lkda.io import write_atomically
from lkda.report.draw.style import Picture, Style, picture
from lkda.report.read.files import read_results_file

KIND = "peer_training"
LAST = 50  # the training loss is averaged over this many steps at the end
CLOSE = 0.01  # nats; models whose losses differ by less count as equal


def differences(peer: dict[str, Any], side: str) -> dict[str, float]:
    """The loss of `side` minus that of lkda's model, in nats per token: first step, last steps, validation.

    Args:
        side: "theirs" for the peer, or "ours_rounded" for lkda's model from weights changed by one rounding.
    """
    ours, other = peer["ours"], peer[side]
    return {
        "first step": other["loss"][0] - ours["loss"][0],
        f"last {LAST} steps": statistics.fmean(other["loss"][-LAST:]) - statistics.fmean(ours["loss"][-LAST:]),
        "validation": other["val_loss"] - ours["val_loss"],
    }


def rows(found: dict[str, Any]) -> list[dict[str, str]]:
    """Two rows for each peer: the peer, and lkda's model from rounded weights."""
    return [
        {
            "model": peer["peer"],
            "minus lkda's loss": words,
            **{where: f"{value:+.1e}" for where, value in differences(peer, side).items()},
            "validation loss": f"{peer[side]['val_loss']:.4f}",
        }
        for peer in found["peers"]
        for side, words in (("theirs", "of the peer"), ("ours_rounded", "of lkda from rounded weights"))
    ]


def redraw(path: Path) -> None:
    """Writes table.json and peer_training.png beside a file of `lkda.commands.studies.peer_training`.

    Raises: ValueError where it is not such a file.
    """
    found = read_results_file(path, kind=KIND)
    try:
        table = {"kind": "table", "rows": rows(found), "note": _note(found)}
        drawn = _picture(found["peers"])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path} is not of lkda.commands.studies.peer_training ({error}).") from error
    write_atomically(path.parent / "table.json", json.dumps(table, indent=1) + "\n")
    write_atomically(path.parent / "peer_training.png", drawn.light)


def _note(found: dict[str, Any]) -> str:
    header, first = found["header"], found["peers"][0]
    versions = ", ".join(dict.fromkeys(peer["version"] for peer in found["peers"]))
    settings, steps = first["settings"], len(first["ours"]["loss"])
    model = settings["model"]
    return (
        f"Nats per token; {steps} steps of {first['tokens_per_step']:,} tokens, "
        f"model={model['name']} ({model['num_layers']} layers of {model['d_model']}), "
        f"data={settings['data']['source']}, {settings['trainer']['precision']}; "
        f"{header['device']}, torch {header['torch']}, {versions}."
    )


def _picture(peers: list[dict[str, Any]]) -> Picture:
    """A column for each peer: both training losses, and below them the differences, with a grey band of +-CLOSE.

    The curves are implementations of one mixer, and have none of the colours of mixers.
    """
    packages = {peer["version"].split()[0] for peer in peers}
    owner = packages.pop() if len(packages) == 1 else "the other package"
    names = ["model of lkda", f"model of {owner}", "model of lkda from rounded weights", f"±{CLOSE:g} nats"]

    def draw(style: Style) -> Figure:
        figure = Figure(figsize=(1.5 + 3.2 * len(peers), 4.4), layout="constrained")
        panels = figure.subplots(2, len(peers), sharex=True, sharey="row", squeeze=False, height_ratios=(2, 1))
        lkda, other, _ = style.implementations
        for (upper, lower), peer in zip(panels.T, peers):
            ours, theirs = peer["ours"]["loss"], peer["theirs"]["loss"]
            steps = range(1, len(ours) + 1)
            upper.plot(steps, ours, color=lkda, linewidth=1.2)
            upper.plot(steps, theirs, "--", color=other, linewidth=1.2)
            upper.set_title(
                f"{peer['peer']} ({peer['version']})\nmixer={peer['settings']['mixer']['name']}", fontsize=10
            )
            lower.axhspan(-CLOSE, CLOSE, color=style.grid, linewidth=0)
            for side, shade in (("ours_rounded", style.faint), ("theirs", other)):
                difference = [b - a for a, b in zip(ours, peer[side]["loss"], strict=True)]
                lower.plot(steps, difference, color=shade, linewidth=0.8)
            lower.set_xlabel("step")
        panels[0, 0].set_ylabel("training loss, nats")
        panels[1, 0].set_ylabel("difference\nfrom lkda, nats")
        handles = [*panels[0, 0].lines, panels[1, 0].lines[0], panels[1, 0].patches[0]]
        columns = 4 if len(peers) > 1 else 1  # a figure with one panel is too narrow for more
        figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
        return figure

    return picture(draw)
