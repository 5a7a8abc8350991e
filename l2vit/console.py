"""The printing half of :mod:`l2vit.cli` under its old name."""

from l2vit.cli import flush as flush
from l2vit.cli import mute as mute
from l2vit.cli import tell as tell
