"""Parts of the export command: formats, checks, int8 and accuracy."""
