"""Heads and losses that sit on any backbone."""
