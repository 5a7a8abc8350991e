"""The old place of Swin, kept for those who import it from here."""

from l2vit.models.families.swin import Swin

__all__ = ["Swin"]
