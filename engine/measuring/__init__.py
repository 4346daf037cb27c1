"""Throughput, quality and cost, and the tables and charts that show them."""
