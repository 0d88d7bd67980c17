"""Page of tools/demo.py: models, computing processes and server."""
