"""Parts of the export command: the formats, their checks, calibration and comparison with data."""
