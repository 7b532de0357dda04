"""Seams to training frameworks: thin adapters, each imported by name and only where its framework is used."""
