"""Studies: what their files say, and how their jobs are run."""

from localfeat.studies.study import Job, Study, load_study, read_grid, study_file

__all__ = ["Job", "Study", "load_study", "read_grid", "study_file"]
