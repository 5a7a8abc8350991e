"""Architectures, registered with timm on import."""

from l2vit.models import registry as registry
from l2vit.models.families import variants as variants
