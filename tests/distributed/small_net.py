"""A network of a few thousand parameters with BatchNorm and drop path, known to timm."""

from timm.layers import DropPath
from timm.models import register_model
from torch import nn

from l2vit.models.layers import BatchNorm2d


class SmallNet(nn.Module):
    """Two convolutions and a head, for any input size."""

    def __init__(self, num_classes=10, drop_path_rate=0.0, norm=True, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1, bias=not norm)
        self.norm = BatchNorm2d(width) if norm else nn.Identity()
        self.mix = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.body = nn.Conv2d(2 * width, 2 * width, 3, 1, 1)
        self.drop_path = DropPath(drop_path_rate)
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, x):
        x = nn.functional.gelu(self.norm(self.stem(x)))
        x = nn.functional.gelu(self.mix(x))
        x = x + self.drop_path(self.body(x))
        return self.head(x.mean((2, 3)))

    def group_matcher(self, coarse=False):
        return {"stem": r"^stem|^norm", "blocks": [(r"^mix", (0,)), (r"^body", (1,))]}


@register_model
def engine_small_net(pretrained=False, **kwargs):
    """For the engine's tests only; what timm adds to every call is left aside."""
    added = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    return SmallNet(**{name: value for name, value in kwargs.items() if name not in added})


TIMM_MODELS = {
    "resnet18": {"layers": [1, 1, 1, 1], "channels": [16, 32, 32, 32]},
    "efficientnet_b0": {},
    "mobilenetv3_small_100": {},
    "swin_tiny_patch4_window7_224": {
        "depths": [2, 2],
        "num_heads": [1, 2],
        "embed_dim": 32,
        "window_size": 4,
    },
    "vit_tiny_patch16_224": {"depth": 2},
    "convnext_atto": {"depths": [1, 1, 1, 1]},
}
"""timm's own networks and arguments that make them small where there are any."""
