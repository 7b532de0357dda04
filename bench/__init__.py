"""Benchmarks: every figure of the project comes from here, with its error gate, its commit and its machine."""
