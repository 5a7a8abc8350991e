"""Architectures, registered with timm on import."""
