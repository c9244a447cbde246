"""Files that commands hand to one another: strict JSON, checksums, atomic writes, locks, provenance.

May import: core. No torch.
Exports: `read_json`, `write_json`, `read_rows` (json_files), `stay_inside` (inside), `describe_file` (checksums).
"""
