"""The subjects of tools/benchmark.py, and how they are measured."""
