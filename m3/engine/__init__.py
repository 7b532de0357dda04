"""The embedded engine: paged cache, continuous batching, tree speculation, exact log-probabilities."""
