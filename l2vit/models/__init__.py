"""Architectures, registered with timm on import."""

import timm
from timm.models import _registry

from l2vit.models import registry as registry
from l2vit.models.families import variants as variants

# timm names a module by the last part of its path, which is registry and variants for ours; this
# way timm.list_models(module="l2vit") finds them all.
_registry._module_to_models["l2vit"].update(
    name
    for name in timm.list_models()
    if timm.model_entrypoint(name).__module__ in (registry.__name__, variants.__name__)
)
