"""Measurements: the naive image of the contract, and what is measured against it."""
