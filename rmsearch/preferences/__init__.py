"""Preferences: queries, positives, negatives, orders, judges, ladders."""
