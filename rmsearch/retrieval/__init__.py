"""Retrieval: vectors, BM25, rankings, runs, candidates and their fusion."""
