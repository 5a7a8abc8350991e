"""Imports that docs/models.md showed before keep working."""

from l2vit.models import convert, export, ops
from l2vit.models.families.swin import Swin
from l2vit.models.host_swin import Swin as OldSwin
from l2vit.models.kernels import use
from l2vit.models.timm_format import convert_authors
from l2vit.models.tracing import export_any_size


def test_they_are_the_same_objects():
    assert OldSwin is Swin and use is ops.use_triton
    assert convert_authors is convert.read_released
    assert export_any_size is export.export_any_size
