"""One file a task: rows to examples, response format, scorer."""
