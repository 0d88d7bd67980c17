"""Code that several commands share: training engine, data, command line."""
