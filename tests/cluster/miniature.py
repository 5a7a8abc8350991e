"""The small run that the cluster tests disturb, and what must come of it."""

from pathlib import Path

import torch

from l2vit import config

MINIATURE = {
    "model__name": "l2vit_mini",
    "model__window_size": 4,
    "model__drop_path_rate": 0.1,
    "data__input_size": 32,
    "eval__every": "100000 steps",
    "schedule__length": "60 steps",
}
NASTY = "about.paper=a  b;touch pwned 'x' \"y\" [*?] `id` $HOME \\ | & < > ( ) { } !# ~ %"
"""An argument with every character that a shell may read otherwise."""


def kept_whole(run: Path) -> None:
    """No shell has read `NASTY` on its way to the program."""
    assert config.read_tree(run / "config.yaml")["about"]["paper"] == NASTY.partition("=")[2]


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    """The same weights, bit for bit.

    Ranks average BatchNorm's statistics at every save: a save out of turn leaves these the same but
    for rounding.
    """
    assert first.keys() == second.keys()
    statistics = [key for key in first if "running_" in key]
    weights = first.keys() - set(statistics)
    assert [key for key in weights if not torch.equal(first[key], second[key])] == []
    for key in statistics:
        torch.testing.assert_close(first[key], second[key], rtol=1e-5, atol=1e-6)
