"""Campaigns that try to break the package: each is a command that prints its seed, its count and what it found."""
