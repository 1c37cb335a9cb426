"""Asks questions with known answers at every granularity, and compares the ways to choose one."""
