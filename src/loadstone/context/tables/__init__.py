"""Tables of rows and a target column, predictions for them, and metrics of predictions."""

from loadstone.context.tables.predictions import Predictions
from loadstone.context.tables.table import Schema, Table, infer_schema, read_table

__all__ = ["Predictions", "Schema", "Table", "infer_schema", "read_table"]
