"""Make a model INT4: round its linears (round_to_nearest), measure what that costs (perplexity), write it (export)."""
