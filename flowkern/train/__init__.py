"""The trainer: the only place that moves parameters and writes files."""
