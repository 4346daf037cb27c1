"""Drafted tokens, and whether they pay."""
