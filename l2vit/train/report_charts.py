"""The curves of a run, or of several runs over one another."""

from __future__ import annotations

from collections.abc import Sequence

from l2vit import charts, pages
from l2vit.train.run_record import RunRecord

_TRAINING = {
    "loss": "training loss (nats)",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "param_norm": "parameter norm",
}
_SPEED = {
    "images_per_second": "images per second",
    "mfu_percent": "model FLOP utilisation (%)",
    "data_wait_percent": "time waiting for data (%)",
    "memory_gib": "memory of rank 0 (GiB)",
    "checkpoint_seconds": "seconds to write a checkpoint",
}
_SMOOTHED = ("loss", "grad_norm", "images_per_second", "mfu_percent", "data_wait_percent")
_EVALUATED = {
    "/top1_percent": "top-1 accuracy (%)",
    "/top5_percent": "top-5 accuracy (%)",
    "/bbox_AP": "box AP",
    "/segm_AP": "mask AP",
    "/mIoU": "mean IoU (%)",
    "/loss": "evaluation loss (nats)",
}
_PHASE = "phase_percent/"


def sections(runs: Sequence[RunRecord]) -> str:
    """All charts that the runs have records for, the evaluations first."""
    groups = [
        ("Accuracy", [_evaluated(runs, end, title) for end, title in _EVALUATED.items()]),
        ("Training", [_curves(runs, key, title) for key, title in _TRAINING.items()]),
        ("Speed", [*(_curves(runs, key, title) for key, title in _SPEED.items()), _phases(runs)]),
        ("Linear attention", [_clamped(runs)]),
    ]
    return "".join(
        pages.section(title, f'<div class="charts">{"".join(drawn)}</div>')
        for title, drawn in groups
        if any(drawn)
    )


def phase_shares(run: RunRecord) -> list[tuple[str, float]]:
    """Mean percentage of the time in each phase, the largest first."""
    found: dict[str, float] = {}
    recorded = [r for r in run.records if any(key.startswith(_PHASE) for key in r)]
    for record in recorded:
        for key, value in record.items():
            if key.startswith(_PHASE):
                name = key.removeprefix(_PHASE)
                found[name] = found.get(name, 0.0) + value / len(recorded)
    return sorted(found.items(), key=lambda pair: -pair[1])


def _curves(runs: Sequence[RunRecord], key: str, title: str) -> str:
    names = [run.name for run in runs] if len(runs) > 1 else [key]
    series = {name: run.points(key) for name, run in zip(names, runs, strict=True)}
    return charts.line_chart(title, series, per_epoch=_epoch(runs), smooth=key in _SMOOTHED)


def _evaluated(runs: Sequence[RunRecord], ending: str, title: str) -> str:
    series = {}
    for run in runs:
        keys = sorted({k for record in run.records for k in record if k.endswith(ending)})
        for key in keys:
            measured = key.removesuffix(ending)
            name = f"{run.name}, {measured}" if len(runs) > 1 else measured
            series[name] = run.points(key)
    return charts.line_chart(title, series, per_epoch=_epoch(runs))


def _epoch(runs: Sequence[RunRecord]) -> float:
    """Steps of an epoch where it is the same in all runs."""
    found = {run.per_epoch for run in runs}
    return found.pop() if len(found) == 1 else 0.0


def _phases(runs: Sequence[RunRecord]) -> str:
    if len(runs) != 1:
        return ""
    shares = [(name, round(share, 1)) for name, share in phase_shares(runs[0])]
    return charts.bar_chart("where the time goes", shares, unit="%")


def _clamped(runs: Sequence[RunRecord]) -> str:
    if len(runs) != 1:
        return ""
    run = runs[0]
    keys = {key for record in run.records for key in record if key.startswith("clamped_percent/")}
    series = {key.partition("/")[2]: run.points(key) for key in sorted(keys)}
    title = "denominators below the clamp (%), by layer"
    return charts.line_chart(title, series, per_epoch=_epoch(runs))
