"""Text: where documents come from, how their files are read, and which are kept back for validation."""
