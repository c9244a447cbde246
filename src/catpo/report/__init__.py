"""The report: one self-contained HTML page. `build.report` is the entry; nothing here reaches torch."""
