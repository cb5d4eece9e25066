"""Helpers of the tests: processes, a Hub on loopback, tiny models, faults."""
