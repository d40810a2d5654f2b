"""Scoring: pairs, the model that scores them, scores kept, the best of them."""
