"""The page of the command tools/demo.py: models, computing processes, page and server."""
