"""Smaller networks: what to take away, how to take it away, and what it then weighs."""
