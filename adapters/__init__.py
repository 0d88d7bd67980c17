"""Doors to other ecosystems; each module needs the extra of its name."""
