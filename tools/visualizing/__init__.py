"""Pictures and measures of the command tools/visualize.py."""
