"""The live display of runs and sweeps in a terminal."""
