"""The parts of `rmsearch.search`: arguments, pairs of work, the engine's thread, scores kept, the best of them."""
