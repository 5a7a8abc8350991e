"""The old place of export_any_size, kept for those who import it from here."""

from l2vit.models.export import export_any_size

__all__ = ["export_any_size"]
