"""The report of a run for people: a summary on the console, and ``report.html``."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from l2vit import files, pages
from l2vit.data.bad_samples import LOG_NAME, recorded
from l2vit.errors import UserError
from l2vit.train import checkpoint, history, measured, report_charts
from l2vit.train.metrics import Metrics, clock
from l2vit.train.run_record import RunRecord

NAME = "report.html"
_MOST_EVENTS = 40


def finish(run: Path, metrics: Metrics, *, main: bool, done: bool) -> None:
    """Write ``report.html`` and print the summary; rank 0 only."""
    if not main:
        return
    step = RunRecord.load(run).last("step") or 0
    history.append(run, "finished" if done else "stopped", step=step)
    record = RunRecord.load(run)
    record.finished = done
    try:
        files.write_text(run / NAME, page(record))
    except UserError as error:  # the run itself is saved
        metrics.say(str(error), warn=True)
    state = "finished" if done else "stopped; the same command continues it"
    rows = "\n".join(f"  {name:32} {value}" for name, value in summary(record))
    metrics.say(f"{run}: {state}\n{rows}\n  {'report':32} {run / NAME}")


def summary(run: RunRecord) -> list[tuple[str, str]]:
    """What is worth knowing at the end, as (name, text)."""
    if not run.records:
        return [("records", "none yet")]
    rows = [
        ("optimizer steps", f"{run.records[-1]['step']:,}"),
        ("images", f"{run.last('images') or 0:,.0f}"),
    ]
    times = [record["time"] for record in run.records if "time" in record] or [0.0]
    rows.append(("time since the first record", clock(max(times[-1] - times[0], 0))))
    for key, text in (
        ("loss", "{:.4f}"),
        ("images_per_second", "{:,.1f}"),
        ("mfu_percent", "{:.1f}"),
        ("data_wait_percent", "{:.1f}"),
        ("skipped_steps", "{:.0f}"),
        ("rollbacks", "{:.0f}"),
        ("checkpoint_seconds", "{:.2f}"),
        ("memory_gib", "{:.2f}"),
    ):
        value = run.last(key)
        if value is not None:
            rows.append((f"last {key}", text.format(value)))
    for key in sorted({key for record in run.records for key in record if "/top" in key}):
        if series := run.points(key):
            step, best = max(series, key=lambda point: point[1])
            rows.append((key, f"{series[-1][1]:.3f} (best {best:.3f} at step {step:,.0f})"))
    return rows + _replaced(run)


def _replaced(run: RunRecord) -> list[tuple[str, str]]:
    """Where to read on if samples were unreadable and others took their places."""
    if run.directory is None:
        return []
    log = run.directory / LOG_NAME
    count = len(recorded(log))
    return [("bad samples, replaced", f"{count:,}, listed in {log}")] if count else []


def page(run: RunRecord) -> str:
    """The report as one HTML page without any other file."""
    head = f"<h1>{pages.shown(run.name)}</h1><p>{_state(run)}</p>{pages.cards(_cards(run))}"
    parts = (
        pages.section("What it was", pages.facts(_what(run))),
        report_charts.sections([run]),
        pages.section("What happened", _events(run)),
        pages.section("What came of it", _outcome(run)),
        pages.section("Predicted and actual", _predicted(run)),
    )
    return pages.document(f"{run.name}: report", head + "".join(parts))


def _state(run: RunRecord) -> str:
    step, total = run.last("step") or 0, run.start.get("steps")
    of = f" of {total:,}" if isinstance(total, int) else ""
    if run.finished:
        return f"{pages.pill('finished', 'good')} {step:,} steps"
    last = run.history[-1]["event"] if run.history else ""
    word, kind = {"failed": ("failed", "bad")}.get(last, ("not finished", "warn"))
    left = run.last("seconds_left")
    rest = f", about {clock(left)} left" if left else ""
    return f"{pages.pill(word, kind)} step {step:,}{of}{rest}"


def _cards(run: RunRecord) -> list[tuple[str, str]]:
    """(value, what it is), the accuracy first."""
    unit = "%" if run.headline.endswith("_percent") else ""
    name = run.headline.strip("/").replace("top1_percent", "top-1")
    cards = [
        (f"{run.last(key):.2f}{unit}", f"{name}, {_weights(key, run.headline)}")
        for key in run.headlines
    ]
    for key, form, what in (
        ("loss", "{:.4f}", "training loss, last"),
        ("images_per_second", "{:,.0f}", "images a second, last"),
        ("mfu_percent", "{:.1f}%", "model FLOP utilisation"),
        ("data_wait_percent", "{:.1f}%", "of the time waiting for data"),
        ("skipped_steps", "{:.0f}", "steps skipped"),
        ("rollbacks", "{:.0f}", "times rolled back"),
    ):
        if (value := run.last(key)) is not None:
            cards.append((form.format(value), what))
    if phases := report_charts.phase_shares(run):
        cards.append((phases[0][0], f"slowest phase: {phases[0][1]:.0f}% of the time"))
    restarts = sum(event["event"] == "start" for event in run.history) - 1
    if restarts > 0:
        cards.append((f"{restarts}", "times started again"))
    return cards


def _weights(key: str, headline: str) -> str:
    name = key.removesuffix(headline)
    base = name.removesuffix("_ema")
    return f"EMA on {base}" if name != base else f"raw on {base}"


def _what(run: RunRecord) -> list[tuple[str, str]]:
    """The facts of the run, as far as its files have them."""
    about = {key: str(run.setting(f"about.{key}") or "") for key in ("paper", "expected")}
    return [
        ("model", _model(run)),
        ("data", _data(run)),
        ("batch", _batch(run)),
        ("ranks", _ranks(run)),
        ("length", _length(run)),
        ("learning rate", _rate(run)),
        ("EMA decay", str(run.setting("ema.decay") or "none")),
        ("first weights", str(_first(run).get("weights", ""))),
        ("recipe", about["paper"]),
        ("expected", about["expected"]),
        ("command", _command(run)),
        ("code", str(run.start.get("commit", ""))),
        ("versions", _pairs(run.start.get("versions"))),
        ("directory", str(run.directory or "")),
    ]


def _first(run: RunRecord) -> dict[str, Any]:
    return next((event for event in run.history if event["event"] == "start"), {})


def _count(value: Any, form: str = ",.0f") -> str:
    return format(value, form) if type(value) in (int, float) else "?"


def _model(run: RunRecord) -> str:
    name, start = str(run.setting("model.name") or ""), run.start
    if not start:
        return name
    millions = _count(start.get("parameters", 0) / 1e6, ",.2f")
    giga = _count(start.get("multiply_adds_per_image", 0) / 1e9, ",.3f")
    size = run.setting("data.input_size")
    at = f" at {size} pixels" if size else ""
    return f"{name}: {millions} M parameters, {giga} G multiply-adds an image{at}"


def _data(run: RunRecord) -> str:
    if not run.start:
        return str(run.setting("data.train") or "")
    start = run.start
    named = f"{start.get('dataset')}, " if start.get("dataset") else ""
    samples, classes = _count(start.get("samples")), _count(start.get("classes"))
    return f"{named}{samples} samples of {classes} classes in {start.get('data')}"


def _batch(run: RunRecord) -> str:
    batch, start = run.setting("schedule.global_batch"), run.start
    if not start:
        return str(batch or "")
    micro, steps = _count(start.get("micro_batch")), _count(start.get("accumulation"))
    return f"{batch} = micro-batch {micro} × accumulation {steps} × {_count(start.get('ranks'))}"


def _ranks(run: RunRecord) -> str:
    start, engine = run.start, run.setting("engine") or {}
    if not start:
        return ""
    stage, precision = engine.get("zero_stage"), engine.get("precision")
    return (
        f"{_count(start.get('ranks'))} on {start.get('device')}"
        f" ({_count(start.get('ranks_per_node'))} a node, first {start.get('host')}),"
        f" ZeRO-{stage}, {precision}"
    )


def _length(run: RunRecord) -> str:
    length, warmup = run.setting("schedule.length"), run.setting("schedule.warmup")
    if not run.start:
        return str(length or "")
    steps, epoch = _count(run.start.get("steps")), _count(run.start.get("steps_per_epoch"))
    return f"{length}: {steps} steps, {epoch} an epoch; warm-up {warmup}"


def _rate(run: RunRecord) -> str:
    peak = run.start.get("peak_learning_rate", run.setting("optim.lr"))
    return "" if peak is None else f"{_count(peak, '.3g')} at its peak"


def _command(run: RunRecord) -> str:
    words = run.start.get("command")
    if not isinstance(words, list) or not words:
        return str(run.setting("about.command") or "")
    first = ["bash"] if str(words[0]).endswith(".sh") else ["python"]
    return shlex.join([*first, *map(str, words)])


def _pairs(values: Any) -> str:
    found = values.items() if isinstance(values, dict) else ()
    return ", ".join(f"{name} {value}" for name, value in found)


def _events(run: RunRecord) -> str:
    """Starts, ends, failures, skipped steps and rollbacks, in the order of time."""
    found = [_told(event) for event in run.history] + _counted(run)
    found.sort(key=lambda event: event[0])
    left_out = len(found) - _MOST_EVENTS
    rows = [
        (time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)), step, what)
        for when, step, what in found[-_MOST_EVENTS:]
    ]
    note = f'<p class="quiet">and {left_out:,} before these</p>' if left_out > 0 else ""
    return note + pages.table(("time", "step", "what"), rows, kind="events") if rows else ""


def _told(event: dict[str, Any]) -> tuple[float, str, str]:
    step = _count(event.get("step", "")) if "step" in event else ""
    what = str(event["event"])
    if what == "start":
        lost = (event.get("reached") or 0) - (event.get("step") or 0)
        again = f", {lost:,} steps done again" if lost > 0 else ""
        ranks = f"{_count(event.get('ranks'))} ranks on {event.get('device')}"
        what = f"started from {event.get('weights')}, {ranks}{again}"
    elif what == "failed":
        what = f"failed: {event.get('why')}"
    elif what == "exported":
        what = f"exported to {event.get('out')}"
    return event["time"], step, what


def _counted(run: RunRecord) -> list[tuple[float, str, str]]:
    """Where the counts of skipped steps and of rollbacks rose."""
    found = []
    for key, word in (("skipped_steps", "skipped steps"), ("rollbacks", "rollbacks")):
        before = 0
        for record in run.records:
            if record.get(key, before) > before:
                step = f"{record['step']:,}"
                found.append((record.get("time", 0.0), step, f"{word} so far: {record[key]:.0f}"))
            before = record.get(key, before)
    return found


def _outcome(run: RunRecord) -> str:
    rows = [*_checkpoints(run), *_exports(run)]
    command, why = _next(run)
    return (
        pages.facts(rows)
        + f'<p class="quiet">Next, {why}:</p><pre>{pages.shown(command)}</pre>'
        + pages.facts(_replaced(run))
    )


def _checkpoints(run: RunRecord) -> list[tuple[str, str]]:
    if run.directory is None or not (steps := checkpoint.complete_steps(run.directory)):
        return [("checkpoints", "none yet")]
    rows = [("last checkpoint", str(checkpoint.step_directory(run.directory, steps[-1])))]
    best = checkpoint.best_step(run.directory)
    if best is not None:
        figures = [
            f"{_weights(key, run.headline)} {value:.2f}"
            for key in run.headlines
            for step, value in run.points(key)
            if step == best
        ]
        where = checkpoint.step_directory(run.directory, best)
        rows.insert(0, ("best checkpoint", f"{where} ({', '.join(figures) or f'step {best:,}'})"))
    return rows


def _exports(run: RunRecord) -> list[tuple[str, str]]:
    found = [event for event in run.history if event["event"] == "exported"]
    return [("exported to", f"{e.get('out')} ({e.get('weights')} weights)") for e in found]


def _next(run: RunRecord) -> tuple[str, str]:
    """The command that leads on, and what it does."""
    if not run.finished:
        return _command(run) or "the command that began it", "continue"
    task = run.setting("task") or "classify"
    where = shlex.quote(str(run.directory or run.name))
    if task != "classify":
        program = {"detect": "detect", "segment": "segment"}.get(str(task), "evaluate")
        return f"python -m finetune.{program} evaluate --model {where}", "evaluate"
    out = shlex.quote(f"exports/{run.name}")
    return f"python -m finetune export --checkpoint {where} --out {out}", "leave as a timm model"


def _predicted(run: RunRecord) -> str:
    if not run.records or run.directory is None:
        return ""
    if not run.plan:
        return (
            '<p class="quiet">No prediction: <code>python -m pretrain plan --config ... --json'
            f" &gt; {pages.shown(str(run.directory))}/plan.json</code>, then"
            f" <code>python -m pretrain report {pages.shown(str(run.directory))}</code>.</p>"
        )
    rows: Sequence[tuple[str, ...]] = [
        (
            key.replace("_", " "),
            f"{before:,.4g}" if before is not None else "-",
            f"{value:,.4g}",
            f"{value / before:.2f}" if before is not None else "",
        )
        for key, before, value in measured.beside(
            run.plan, measured.figures(run.records, run.directory)
        )
    ]
    device = f"{_count(run.plan.get('ranks'))} × {run.plan.get('device')}"
    had = f"{_count(run.start.get('ranks'))} × {run.start.get('device', '?')}"
    note = f"<p>Predicted for {pages.shown(device)}; the run had {pages.shown(had)}.</p>"
    return note + pages.table(("", "predicted", "actual", "ratio"), rows)
