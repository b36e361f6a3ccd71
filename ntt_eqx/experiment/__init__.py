"""Runs, sweeps, tables and figures; the command line `ntt-eqx`. Needs the extra `cli`."""
