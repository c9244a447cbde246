"""The built-in pictures: what is on them (plan), how they are drawn, described and asked about. Imports no torch."""
