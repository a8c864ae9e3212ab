"""Tables and plots of finished runs, for ``python -m localfeat.report`` and for notebooks."""

from localfeat.reporting.rows import Row, Table, rows, tables
from localfeat.reporting.runs import Material, Run, Study, read_material, read_runs

__all__ = ["Material", "Row", "Run", "Study", "Table", "read_material", "read_runs", "rows", "tables"]
