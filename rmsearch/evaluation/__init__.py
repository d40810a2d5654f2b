"""Evaluation: first stage, rerank, metrics, report."""
