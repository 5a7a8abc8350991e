"""The old place of convert_authors, kept for those who import it from here."""

from l2vit.models.convert import read_released as convert_authors

__all__ = ["convert_authors"]
