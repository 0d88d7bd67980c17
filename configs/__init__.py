"""Recipes: `importlib.resources.files("stvit.configs") / "cls" / "NAME.yaml"`."""
