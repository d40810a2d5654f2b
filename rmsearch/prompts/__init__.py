"""Prompts: a (query, key) pair as token ids."""
