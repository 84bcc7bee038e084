"""Runs with their numbers: the only place where an experiment's settings stand."""
