"""Processes of a launch: finding each other, signals, and noticing when one stops."""
