"""Metrics: measures of runs, significance, tables."""
