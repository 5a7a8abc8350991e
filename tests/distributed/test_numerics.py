"""DeepSpeed ZeRO against a plain single-process loop with fp32 master weights."""

import copy
import itertools

import pytest
import torch
from forked_ranks import Ranks
from timm.utils import ModelEmaV3
from torch import nn

GLOBAL_BATCH = 16
STEPS = 20
DECAY = 0.9
CLASSES = 10
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KEPT = ("accumulation", "precision", "norm", "clip")  # by the plain loop; the rest is the engine's


def rate(step):
    return 3e-3 * (step + 1) / STEPS


def network(norm=True):
    from small_net import SmallNet

    torch.manual_seed(0)
    return SmallNet(num_classes=CLASSES, norm=norm)


def data(step):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(GLOBAL_BATCH, 3, 12, 12, generator=generator)
    return images, torch.randint(0, CLASSES, (GLOBAL_BATCH,), generator=generator)


# -- the plain loop: one process, one fp32 model, a copy of it that computes


def plain_loop(world, accumulation, *, precision="bf16", norm=True, clip=0.0):
    """(losses, gradient norms, parameters, average, buffers) after STEPS steps."""
    master = network(norm)
    average = ModelEmaV3(master, decay=DECAY)
    decays = [p for p in master.parameters() if p.ndim > 1]
    others = [p for p in master.parameters() if p.ndim <= 1]
    groups = [{"params": decays, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    worker = copy.deepcopy(master)
    for parameter in worker.parameters():
        parameter.data = parameter.data.to(DTYPES[precision])
    statistics = [copy.deepcopy(dict(worker.named_buffers())) for _ in range(world)]
    size = GLOBAL_BATCH // (world * accumulation)
    losses, norms = [], []
    for step in range(STEPS):
        images, labels = data(step)
        with torch.no_grad():
            for low, high in zip(worker.parameters(), master.parameters(), strict=True):
                low.copy_(high)
        for parameter in master.parameters():
            parameter.grad = torch.zeros_like(parameter)
        total = 0.0
        for turn, rank in itertools.product(range(accumulation), range(world)):
            first = (turn * world + rank) * size
            swap(worker, statistics[rank])
            worker.zero_grad()
            logits = worker(images[first : first + size].to(DTYPES[precision])).float()
            loss = nn.functional.cross_entropy(logits, labels[first : first + size])
            (loss / accumulation).backward()
            statistics[rank] = copy.deepcopy(dict(worker.named_buffers()))
            total += loss.item() / (world * accumulation)
            for low, high in zip(worker.parameters(), master.parameters(), strict=True):
                high.grad += low.grad.float() / world
        norms.append(nn.utils.clip_grad_norm_(master.parameters(), clip or 1e30).item())
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        mean = {n: torch.stack([s[n].float() for s in statistics]).mean(0) for n in statistics[0]}
        swap(master, mean)
        average.update(master)
        losses.append(total)
    averaged = dict(average.module.named_parameters())
    buffers = {f"buffer/{n}": b for n, b in mean.items()}
    buffers |= {f"ema/{n}": b for n, b in average.module.named_buffers() if b.is_floating_point()}
    return losses, norms, dict(master.named_parameters()), averaged, buffers


@torch.no_grad()
def swap(model, buffers):
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


# -- the engine, on every rank


def engine_loop(world, cases):
    return [run_case(world, **case) for case in cases]


def run_case(world, *, fused=False, **case):
    plain = torch.optim.AdamW
    if fused:  # as on GPUs, where a step is decided about on the device
        torch.optim.AdamW = fused_adamw
    try:
        return run_engine(world, **case)
    finally:
        torch.optim.AdamW = plain


def fused_adamw(*args, plain=torch.optim.AdamW, **options):
    return plain(*args, **{**options, "fused": True})


def run_engine(world, *, stage, accumulation, precision="bf16", norm=True, clip=0.0, **engine):
    from l2vit.data.order import split
    from l2vit.train.config import ModelConfig, RunConfig, ScheduleConfig, TrainConfig
    from l2vit.train.engine import Engine

    config = TrainConfig(
        run=RunConfig(dir=""),
        model=ModelConfig(name=""),
        schedule=ScheduleConfig(global_batch=GLOBAL_BATCH),
    )
    config.engine.zero_stage, config.engine.precision = stage, precision
    config.engine.channels_last = False
    vars(config.engine).update(engine)
    config.ema.decay, config.optim.clip_grad = DECAY, clip
    size = GLOBAL_BATCH // (world.size * accumulation)
    parts = split(GLOBAL_BATCH, world=world.size, micro_batch=size)
    sections = (config.engine, config.optim, config.ema)
    engine = Engine(network(norm), *sections, world=world, split=parts)
    losses, norms = [], []
    for step in range(STEPS):
        images, labels = data(step)
        total = 0.0
        for turn in range(parts.accumulation):
            first = (turn * world.size + world.rank) * size
            logits = engine.forward(images[first : first + size])
            loss = nn.functional.cross_entropy(logits, labels[first : first + size])
            total += loss.item() / parts.accumulation
            engine.backward(loss)
            if turn < parts.accumulation - 1:
                engine.micro_step()
        outcome = engine.step(lr=rate(step), weight_decay=0.05)
        assert outcome.applied
        losses.append(world.sum([total])[0] / world.size)
        norms.append(float(outcome.grad_norm))
    found = assemble(world, engine)
    engine.average_buffers()
    buffers = {name: buffer.clone() for name, buffer in engine.buffers().items()}
    shown = inference(engine)
    with engine.averaged_weights():
        shown_average = inference(engine)
    assert torch.equal(inference(engine), shown), "leaving the average changed the weights"
    engine.close()
    return losses, norms, found, buffers, (shown, shown_average)


def assemble(world, engine):
    """Whole tensors by key, put together from the shards of all ranks."""
    own = [(key, shard.start, view.clone()) for key, shard, view in engine.tensors()]
    parts = {}
    everywhere = [piece for rank in world.gather(own) for piece in rank]
    for key, _, values in sorted(everywhere, key=lambda piece: piece[:2]):
        parts.setdefault(key, []).append(values)
    return {key: torch.cat(values) for key, values in parts.items()}


def inference(engine):
    engine.module.eval()
    logits = engine.infer(data(0)[0])
    engine.module.train()
    return logits


def compare(result, reference, precision="bf16"):
    """Compare one engine run with the plain loop.

    Losses to 1e-6. Weights as the L2 norm of the difference over all of them: AdamW divides
    by √v, so an element whose gradient is nearly zero shows the order of the fp32 sums.
    """
    losses, norms, found, buffers, (shown, shown_average) = result
    expected_losses, expected_norms, parameters, average, expected_buffers = reference
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    for kind, tensors in (("param", parameters), ("ema", average)):
        ours = torch.cat([found[f"{kind}/{name}"] for name in tensors])
        plain = torch.cat([tensor.detach().reshape(-1) for tensor in tensors.values()])
        assert (ours - plain).norm() <= 3e-6 * plain.norm(), kind
    for name, tensor in expected_buffers.items():
        torch.testing.assert_close(buffers[name].float(), tensor, rtol=1e-5, atol=1e-6)
    for kind, logits in (("param", shown), ("ema", shown_average)):
        # The model must compute with these very weights and statistics, in its own precision.
        model = network(norm=any("norm" in name for name in parameters)).to(DTYPES[precision])
        names = dict(model.named_parameters())
        for name, parameter in names.items():
            parameter.data.copy_(found[f"{kind}/{name}"].view(parameter.shape))
        for name, buffer in model.named_buffers():
            key = f"ema/{name}" if kind == "ema" and f"ema/{name}" in buffers else f"buffer/{name}"
            buffer.data = buffers[key].clone()
        with torch.no_grad():
            expected = model.eval()(data(0)[0].to(DTYPES[precision])).float()
        torch.testing.assert_close(logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_stage_and_accumulation_follows_the_plain_loop(world, tmp_path):
    accumulations = [a for a in (1, 2, 4) if world * a <= 8]
    cases = [{"stage": stage, "accumulation": a} for stage in (1, 2, 3) for a in accumulations]
    stage, fp32 = world.bit_length(), {"accumulation": 2, "precision": "fp32"}
    cases.append({"stage": stage, **fp32})
    # Clipping multiplies in another order; in bf16 such a last bit may turn a rounded weight.
    cases.append({"stage": stage, **fp32, "clip": 0.3})
    cases.append({"stage": 2, "accumulation": 2, "overlap": True, "bucket": 1000})
    cases += [{"stage": stage, "accumulation": 2, "fused": True} for stage in (1, 2)]
    cases += [{"stage": 1, "accumulation": a, "overlap": True, "bucket": 500} for a in (1, 2)]
    by_rank = Ranks(engine_loop, world, cases, directory=tmp_path).results()
    references = {}
    for case, result in zip(cases, by_rank[0], strict=True):
        options = {k: v for k, v in case.items() if k in KEPT}
        key = tuple(sorted(options.items()))
        if key not in references:
            references[key] = plain_loop(world, **options)
        try:
            compare(result, references[key], case.get("precision", "bf16"))
        except AssertionError as error:
            raise AssertionError(f"{case} at world {world}: {error}") from error
    for results in by_rank[1:]:
        for mine, first in zip(results, by_rank[0], strict=True):
            assert mine[0] == first[0], "ranks disagree about the loss"


def test_one_loss_curve_for_any_split(tmp_path):
    """The same images in other micro-batches: equal but for the order of fp32 sums."""
    curves = {}
    for world, accumulations in ((1, (1, 4)), (2, (1, 2)), (4, (1,))):
        cases = [
            {"stage": 2, "accumulation": a, "precision": "fp32", "norm": False}
            for a in accumulations
        ]
        results = Ranks(engine_loop, world, cases, directory=tmp_path).results()[0]
        for accumulation, result in zip(accumulations, results, strict=True):
            curves[world, accumulation] = result[0]
    first = curves.pop((1, 1))
    for split, curve in curves.items():
        assert curve == pytest.approx(first, rel=1e-6), split
