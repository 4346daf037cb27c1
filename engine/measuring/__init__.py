"""Throughput, quality and memory traffic, and the tables and charts that show them."""
