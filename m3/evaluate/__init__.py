"""Evaluations: stations of a consultation, HealthBench, hallucination, replays of recorded transcripts."""
