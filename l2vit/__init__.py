"""L²ViT (arXiv 2501.16182): ``import l2vit`` registers every model with timm."""

from l2vit import models as models

__version__ = "0.1.0"
