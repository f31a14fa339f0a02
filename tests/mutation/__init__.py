"""Breaks the code on purpose and asks whether the tests notice."""
