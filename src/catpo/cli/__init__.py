"""The command line: arguments in, one function call, result out; tables for the terminal, doctor, demo.

May import: everything, the engines only inside functions, so that `--help` starts at once.
Exports: `main` (main).
"""
