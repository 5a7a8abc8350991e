"""Architectures, registered with timm on import."""

from l2vit.models import families as families
from l2vit.models import registry as registry
