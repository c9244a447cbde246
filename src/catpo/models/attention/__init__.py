"""Attention of the decoder: recorded, computed for packed rows, and read in the last layer only where it is needed."""
