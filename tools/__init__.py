"""Commands: `python -m stvit.tools.<name> --help`."""
