"""`catpo study`: a grid of methods, options and seeds, run to the end, with its tables and figures."""
