"""Micro-batch and accumulation from the one number in the configuration, the global batch."""

from __future__ import annotations

from dataclasses import dataclass

from l2vit.errors import ConfigError

_SHOWN = 8


@dataclass(frozen=True)
class Split:
    """micro_batch × accumulation × world = global batch."""

    micro_batch: int
    """Images per rank and backward pass."""
    accumulation: int
    """Backward passes per optimizer step."""
    world: int

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.world


def split(global_batch: int, *, world: int, micro_batch: int = 0, multiple_of: int = 1) -> Split:
    """Divide the global batch over ``world`` ranks.

    Args:
        global_batch: images per optimizer step over all ranks.
        world: number of ranks.
        micro_batch: images per rank and backward pass; 0 takes a rank's whole share at once.
        multiple_of: what must divide the micro-batch (``augment.mix_group``).

    Raises:
        ConfigError: no such division; lists the possible ones.
    """
    options = possible(global_batch, world=world, multiple_of=multiple_of)
    if not options:
        raise ConfigError(
            f"schedule.global_batch: {global_batch} cannot be divided over {world} ranks in"
            f" micro-batches that are multiples of {multiple_of} (augment.mix_group);"
            f" the nearest that can is {_nearest(global_batch, world * multiple_of)}"
        )
    chosen = micro_batch or options[0].micro_batch
    for option in options:
        if option.micro_batch == chosen:
            return option
    listed = ", ".join(f"{o.micro_batch}×{o.accumulation}" for o in options[:_SHOWN])
    more = ", …" if len(options) > _SHOWN else ""
    raise ConfigError(
        f"engine.micro_batch: {micro_batch} does not divide schedule.global_batch={global_batch}"
        f" over {world} ranks; possible micro_batch×accumulation: {listed}{more}"
    )


def possible(global_batch: int, *, world: int, multiple_of: int = 1) -> list[Split]:
    """Every division of the global batch, largest micro-batch first."""
    if global_batch % world:
        return []
    share = global_batch // world
    sizes = [m for m in range(share, 0, -1) if share % m == 0 and m % multiple_of == 0]
    return [Split(m, share // m, world) for m in sizes]


def halve(current: Split, *, multiple_of: int = 1) -> Split | None:
    """The next smaller possible micro-batch, at most half; None when there is none."""
    for option in possible(current.global_batch, world=current.world, multiple_of=multiple_of):
        if 2 * option.micro_batch <= current.micro_batch:
            return option
    return None


def _nearest(number: int, step: int) -> int:
    return max(step, round(number / step) * step)
