"""Studies: read their files and run their jobs."""
