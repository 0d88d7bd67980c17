"""Recipes as package data: `importlib.resources.files("stvit.configs") / "cls" / "<recipe>.yaml"`."""
