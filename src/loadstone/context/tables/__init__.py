"""Tables of rows and a target column, and the metrics of predictions."""
