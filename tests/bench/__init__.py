"""Benchmarks of the built file: ./build.sh bench [start|scale|herd|soak]."""
