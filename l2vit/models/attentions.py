"""The attentions any host may hold, by name."""

from __future__ import annotations

from l2vit.models.attention_focused import FocusedCore
from l2vit.models.attention_injective import InjectiveCore
from l2vit.models.attention_peers import (
    ChannelCore,
    CosCore,
    EfficientCore,
    LeakyReluCore,
    ReluCore,
    SimaCore,
)
from l2vit.models.cores import CoreFactory, EnhancedCore, SoftmaxCore

CORES: dict[str, CoreFactory] = {
    "softmax": SoftmaxCore,
    "enhanced": EnhancedCore,
    "focused": FocusedCore,
    "injective": InjectiveCore,
    "linear": ReluCore,
    "leaky": LeakyReluCore,
    "sima": SimaCore,
    "efficient": EfficientCore,
    "cosformer": CosCore,
    "xca": ChannelCore,
}


def core_factory(attention: str | CoreFactory) -> CoreFactory:
    """The maker of a core; a factory is its own.

    Raises:
        ValueError: an unknown name; lists the known ones.
    """
    if not isinstance(attention, str):
        return attention
    if attention not in CORES:
        raise ValueError(f"unknown attention {attention!r}; known: {', '.join(CORES)}")
    return CORES[attention]


def linear_blocks(types: str, depths: tuple[int, ...]) -> list[list[bool]]:
    """Which blocks of each stage are linear, from a string of one letter per stage.

    L or I: all of them; S: none (softmax); M: the first m, the number behind the letters ("IIMS2").

    Raises:
        ValueError: another letter, or a number of letters other than the stages.
    """
    letters, number = types[: len(depths)], types[len(depths) :]
    bad = len(letters) != len(depths) or set(letters) - set("LISM")
    if bad or (number and not number.isdigit()) or ("M" in letters) != bool(number):
        raise ValueError(f"types {types!r}: one of L, I, S, M per stage, and a number if M occurs")
    first = {"L": max(depths), "I": max(depths), "S": 0, "M": int(number or 0)}
    return [
        [index < first[letter] for index in range(depth)]
        for letter, depth in zip(letters, depths, strict=True)
    ]
