"""Studies: what their files say, and how their jobs are run."""
